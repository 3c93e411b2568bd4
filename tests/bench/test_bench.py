"""Every benchmark runs on a tiny model and says what it measured; no time is asserted."""

import json
import logging
import random

import pytest
from tiny_models import tiny_model
from toy_tokenizers import byte_level
from transformers import AutoConfig

from autodeploy import LLM
from autodeploy.bench.latency import decode
from autodeploy.bench.report import Roof, Row, table
from autodeploy.bench.shapes import SHAPES, dummy_checkpoint
from autodeploy.bench.throughput import SCHEMA, measure_structured, run_autodeploy
from autodeploy.bench.workload import a256, ragged
from autodeploy.cli.main import main
from autodeploy.errors import ConfigError
from autodeploy.runtime.engine import EngineConfig, EngineCore
from autodeploy.runtime.executor import start_executor
from autodeploy.runtime.scheduler import SchedulerConfig
from autodeploy.runtime.structured_params import StructuredOutputsParams

TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("AUTODEPLOY_CACHE", str(tmp_path_factory.getbasetemp() / "bench-cache"))
    # The command sets up the logger of the process; other tests have their own.
    logger = logging.getLogger("autodeploy")
    for name in ("handlers", "level", "propagate"):
        monkeypatch.setattr(logger, name, getattr(logger, name))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def test_all_kinds_share_one_deployment(tiny, tmp_path, capsys):
    report, trace = tmp_path / "report.json", tmp_path / "trace.json"
    kinds = ["latency", "prefill", "throughput", "serve"]
    assert main([
        "bench", "all", "--dummy", tiny, "--dtype", "float32", "--kinds", *kinds,
        "--batch", "1", "4", "--kv", "24", "--steps", "24", "--prefill", "3x20",
        "--requests", "4", "--prompt", "4:8",
        "--output", "2:6", "--against", "generate", "--rate", "100", "--repeat", "2",
        "--json", str(report), "--profile", str(trace),
    ]) == 0  # fmt: skip
    out = capsys.readouterr().out
    for text in ("work ", "% of floor", "host us", "decode, batch 4", "prefill, 3 x 20", "TTFT p99",
                 "E2E p50", "transformers generate", "profiled 20 steps"):  # fmt: skip
        assert text in out
    figures = json.loads(report.read_text())
    assert {row["kind"] for row in figures["results"]} == set(kinds)
    assert figures["cost"]["attention"][0]["key_bytes"] == 2 * 2 * 2 * 16 * 4
    assert figures["ready"]["process"] >= figures["ready"]["deploy"] > 0
    floored = [row for row in figures["results"] if row["floor"] is not None]
    assert [row["kind"] for row in floored] == ["latency", "latency", "prefill", "throughput"]
    assert all(0 < row["percent_of_floor"] < 100 for row in floored)
    assert all(len(row["runs"]) == 2 for row in floored)
    # One trace a batch size.
    assert json.loads(trace.read_text())["traceEvents"]
    assert (tmp_path / "trace-batch-4.json").is_file()
    steps = json.loads((tmp_path / "trace-batch-4-host.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "autodeploy: launch" for event in steps) >= 20
    assert figures["results"][0]["profile"]["host_ms"] > 0


@pytest.fixture(scope="module")
def llm():
    with LLM(tiny_model("llama"), enable_prefix_caching=False) as deployed:
        yield deployed


@pytest.mark.parametrize(("batch", "budget"), [(1, 2048), (3, 2048), (4, 20)])
def test_the_steady_span_has_the_steps_and_the_length_asked_for(llm, batch, budget):
    steady = decode(llm, batch, kv=30, steps=12, budget=budget)
    # With a small budget outputs are longer, for requests that would be prefilled later.
    assert steady.steps == int(steady.steps) >= 12
    assert abs(steady.kv - 30) <= 1 + steady.steps - 12
    assert steady.seconds > 0


def test_constrained_work_has_the_length_of_free_work():
    model = tiny_model("llama", vocab_size=300)
    with LLM(model, tokenizer=byte_level(), enable_prefix_caching=False) as small:
        work = ragged(3, (4, 6), (9, 12), small.vocab_size)
        structured = StructuredOutputsParams(json=SCHEMA)
        assert run_autodeploy(small, work, structured).output_tokens == work.output_tokens
        row = measure_structured(small, work, repeat=2)
    assert row.value > 0
    assert f"{row.details['ratio']:.2f} of without" in row.name


def test_a256_is_drawn_as_it_is_stated():
    source = random.Random(0)
    prompts = []
    for _ in range(256):
        length = source.randint(100, 1024)
        prompts.append([source.randrange(500) for _ in range(length)])
    outputs = [source.randint(100, 1024) for _ in range(256)]
    work = a256(500)
    assert list(work.prompts) == prompts
    assert list(work.outputs) == outputs


@pytest.mark.parametrize("name", SHAPES)
def test_every_named_shape_is_a_config_that_transformers_takes(name):
    config = AutoConfig.from_pretrained(dummy_checkpoint(name))
    assert config.model_type == SHAPES[name]["model_type"]
    assert config.eos_token_id is None
    for field in ("hidden_size", "num_hidden_layers", "vocab_size"):
        assert getattr(config, field) == SHAPES[name][field]


def test_a_shape_nobody_knows_is_an_error_that_suggests_one(tmp_path):
    with pytest.raises(ConfigError, match="llama-3.2-1b"):
        dummy_checkpoint("llama-3.2-1")
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert dummy_checkpoint(str(tmp_path)) == tmp_path


def test_without_a_cost_the_floor_is_a_dash_with_the_cause():
    from toy_runner import ToyRunner

    def build():
        engine = EngineCore(
            ToyRunner(), EngineConfig(SchedulerConfig(max_num_seqs=4, max_model_len=64))
        )
        engine.summary = {"rung": "2", "cause": "it counts on its fingers"}
        return engine

    with LLM.from_parts(start_executor("inprocess", build)) as toy:
        roof = Roof.over(toy)
    assert roof.floor(lambda cost, peaks: 1.0) is None
    text = table([Row("latency", "decode", 2.0, "ms")], roof.cause)
    assert text.splitlines()[1].split() == ["decode", "2.00", "ms", "-", "-"]
    assert text.splitlines()[-1] == "no floor: it counts on its fingers"


def test_percent_of_floor_is_100_at_the_floor_in_both_units():
    assert Row("latency", "a", 4.0, "ms", 1.0).percent_of_floor == 25
    assert Row("prefill", "a", 25.0, "tok/s", 100.0).percent_of_floor == 25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["latency", "--batch", "64", "--max-num-seqs", "8"], "--max-num-seqs"),
        (["latency", "--profile", "x.json", "--executor", "process"], "--profile"),
        (["prefill", "--json", "nowhere/report.json"], "no directory 'nowhere'"),
        (["prefill", "--dummy", "no-such-shape"], "--dummy takes"),
        (["startup", "examples/demo_model", "--dummy", "qwen3-8b"], "name one model"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_built(arguments, message, capsys):
    assert main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_what_was_measured_before_an_error_is_printed(tiny, capsys):
    too_long = ["--prefill", "1x4096"]
    words = ["--kinds", "latency", "prefill", "--batch", "1", "--kv", "8", "--steps", "4"]
    assert main(["bench", "all", "--dummy", tiny, *words, *too_long]) == 1
    captured = capsys.readouterr()
    assert "decode, batch 1" in captured.out
    assert captured.err.splitlines()[-1].startswith("autodeploy: error:")


@pytest.mark.parametrize("words", [["--prefill", "64"], ["--batch", "0"], ["--rate", "-1"]])
def test_malformed_numbers_exit_with_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "all", *words])
    assert stop.value.code == 2


def test_the_cost_survives_a_warm_start_and_another_process():
    costs = []
    for executor in ("inprocess", "process"):
        with LLM("examples/demo_model", executor=executor) as llm:
            costs.append(llm.cost)
            assert llm.summary["device"].startswith(("cpu", "cuda"))
    assert costs[0] == costs[1]
    assert costs[0].weight_bytes > 1_000_000


@pytest.mark.slow
def test_startup_of_random_weights_is_measured_cold_and_warm(tiny, tmp_path, capsys):
    report = tmp_path / "report.json"
    assert main(["bench", "startup", "--dummy", tiny, "--json", str(report)]) == 0
    assert capsys.readouterr().out.startswith("start ")
    assert set(json.loads(report.read_text())) == {"cold", "warm"}
