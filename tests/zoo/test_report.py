"""The zoo's results as JSON, as a page, as a comparison, and on the command line."""

import json

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from autodeploy.cli.main import main
from autodeploy.zoo import report
from autodeploy.zoo.measure import Record, measure_architecture
from autodeploy.zoo.run import run_zoo
from autodeploy.zoo.text_report import text

GOOD = Record(
    "llama", rung=1, exact=True, attention=["2 full"], caches=["4 x token: 512 B"],
    recognised={"rope": 2}, logit_error=3e-7, served={"tokens": 90}, seconds=1.5,
)  # fmt: skip
SLOW = Record("bert", rung=2, exact=True, cause="a mask | of its own", seconds=2.0)
BAD = Record("gpt2", failed=True, cause="it broke")


def test_json_comes_back_as_it_was(tmp_path):
    path = tmp_path / "zoo.json"
    path.write_text(report.to_json([GOOD, SLOW], {"torch": "2"}))
    records, versions = report.from_json(path)
    assert records == {"llama": GOOD, "bert": SLOW}
    assert versions == {"torch": "2"}
    path.write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="no result of"):
        report.from_json(path)


def test_the_page_has_a_row_for_each_and_a_reason_for_each_below_the_top():
    page = report.markdown([GOOD, SLOW, BAD], {"torch": "2"}, seconds=120)
    assert "| llama | rung 1 | 2 full | 4 x token: 512 B |" in page
    assert "2: 1 rung 1, 1 failed." in page
    assert "- **bert** (rung 2): a mask \\| of its own" in page
    assert "- **gpt2** (failed): it broke" in page
    assert page.index("## Decoder language models") < page.index("## Others")


def test_a_comparison_tells_what_changed():
    worse = Record(
        "llama", rung=2, exact=True, attention=["2 full"], caches=GOOD.caches, own_code={"A": 1}
    )
    lines = report.compare({"llama": GOOD, "bert": SLOW}, [worse, BAD])
    assert lines == [
        "llama: outcome was rung 1, is rung 2",
        "llama: own_code was none, is 1 A",
        "gpt2: new, failed",
        "bert: gone",
    ]
    assert report.compare({"llama": GOOD}, [GOOD]) == []


def test_an_inexact_result_is_told_apart():
    assert Record("a", rung=1).outcome == "rung 1, NOT EXACT"
    assert Record("a", cause="encoder").outcome == "refused"
    assert "NOT EXACT" in text(Record("a", rung=1), tiny=True)
    assert "report it with this text" in text(BAD, tiny=True)


def test_a_config_that_makes_no_model_is_a_finding():
    def broken():
        raise ValueError("no such thing")

    record = measure_architecture("x", broken)
    assert (record.outcome, record.cause) == (
        "no model", "no tiny model can be made: ValueError: no such thing",
    )  # fmt: skip


def test_an_encoder_is_refused_with_the_reason():
    record = measure_architecture("t5-like", CONFIG_MAPPING["xlnet"])
    assert record.outcome == "refused"
    assert "is not autoregressive" in record.cause


def test_a_process_that_takes_too_long_is_ended_and_named():
    (record,) = run_zoo(["gemma3n_text"], timeout=0.01)
    assert record.outcome == "failed"
    assert "took more than 0 s" in record.cause


def test_one_model_from_the_command_line(capsys, demo_model):
    assert main(["zoo", "--model", str(demo_model), "--weights"]) == 0
    out = capsys.readouterr().out
    assert "rung 1 of 3 (packed and cached), exact" in out
    assert "8 full" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_model"], "maps no causal language model to 'no_such_model'"),
        (["--model", "x", "--sample"], "--model takes the place"),
        (["--jobs", "0"], "must be positive"),
        (["llama", "--compare", "/nowhere.json"], "--compare /nowhere.json"),
        (["--model", "/nowhere"], "has no readable config"),
    ],
)
def test_wrong_usage_is_one_line(arguments, message, capsys):
    assert main(["zoo", *arguments]) == 1
    assert message in capsys.readouterr().err
