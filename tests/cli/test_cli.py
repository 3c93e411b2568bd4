"""The command line: results on standard output, one line for an error, complete help."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from autodeploy.cli.main import main, parser
from autodeploy.cli.options import read_changes
from autodeploy.errors import CheckpointError, ConfigError

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "examples" / "demo_model")
GREEDY = ["--temperature", "0", "--max-tokens", "8"]


@pytest.fixture(autouse=True)
def shared_cache(tmp_path_factory, monkeypatch):
    """One artifact cache for the file: the first deploy is cold, the others warm."""
    folder = tmp_path_factory.getbasetemp() / "cli-cache"
    monkeypatch.setenv("AUTODEPLOY_CACHE", str(folder))
    # The command sets up the logger of the process; other tests have their own.
    logger = logging.getLogger("autodeploy")
    for name in ("handlers", "level", "propagate"):
        monkeypatch.setattr(logger, name, getattr(logger, name))


def all_parsers(root=None, path=()):
    root = root or parser()
    yield path, root
    for action in root._actions:
        if hasattr(action, "choices") and isinstance(action.choices, dict):
            for name, sub in action.choices.items():
                yield from all_parsers(sub, (*path, name))


def test_every_command_and_option_has_help():
    for path, one in all_parsers():
        for action in one._actions:
            if not hasattr(action, "choices") or not isinstance(action.choices, dict):
                assert action.help, f"{' '.join(path)} {action.dest}"


def test_help_needs_neither_torch_nor_transformers():
    code = (
        "import sys\nfrom autodeploy.cli.main import main\n"
        "try: main(['generate', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    assert "examples:" in out.stdout


def test_generate_prints_the_text_and_nothing_else(capsys):
    assert main(["generate", DEMO, "--prompt", "import os", *GREEDY]) == 0
    first = capsys.readouterr()
    assert first.out.strip()
    assert first.err == ""
    assert main(["generate", DEMO, "--prompt", "import os", *GREEDY]) == 0
    assert capsys.readouterr().out == first.out


def test_streamed_text_is_the_same_text(capsys):
    main(["generate", DEMO, "--prompt", "import os", *GREEDY])
    whole = capsys.readouterr().out
    assert main(["generate", DEMO, "--prompt", "import os", "--stream", *GREEDY]) == 0
    assert capsys.readouterr().out == whole


def test_prompts_from_a_file_as_json_lines(capsys, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("import os\nclass A:\n")
    assert main(["generate", DEMO, "--prompt-file", str(prompts), "--json", "--n", "2",
                 "--seed", "3", "--max-tokens", "4"]) == 0  # fmt: skip
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["prompt"], r["index"]) for r in records] == [
        ("import os", 0), ("import os", 1), ("class A:", 0), ("class A:", 1),
    ]  # fmt: skip
    assert all(len(r["token_ids"]) == 4 and r["finish_reason"] == "length" for r in records)


def test_a_prompt_from_standard_input_and_chat():
    command = [sys.executable, "-m", "autodeploy", "generate", DEMO, "--chat", *GREEDY]
    out = subprocess.run(
        command, input="Return the sum.\n", capture_output=True, text=True, cwd=ROOT
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip()


def test_graphs_are_dumped(tmp_path, capsys):
    folder = tmp_path / "graphs"
    assert main(["generate", DEMO, "--prompt", "x", "--dump-graphs", str(folder), "--verify",
                 "--set", "lower.prefer=[reference]", *GREEDY]) == 0  # fmt: skip
    assert (folder / "00_captured.txt").read_text().startswith("# facts")
    (cached,) = folder.glob("*_cache.txt")
    assert "reference" not in cached.read_text()


def test_recipes_are_listed_shown_and_checked(capsys):
    assert main(["recipe", "list"]) == 0
    assert capsys.readouterr().out.startswith("default ")
    assert main(["recipe", "show", "default", "--set", "compile.backend=inductor"]) == 0
    assert "backend: inductor" in capsys.readouterr().out
    outside = str(ROOT / "examples" / "third_party" / "recipe.yaml")
    assert main(["recipe", "check", outside]) == 0
    assert "canonicalize -> spell_out_rope" in capsys.readouterr().out


def test_env_says_what_a_report_needs(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for name in ("torch: 2.", "transformers: 5.", "python: 3.", "c compiler:", "gpus:", "cache:"):
        assert name in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "./nowhere", "--prompt", "x"], "directory './nowhere' does not exist"),
        (["generate", DEMO, "--prompt", ""], "has no tokens|max_tokens"),
        (["generate", DEMO, "--prompt", "x", "--temperature", "-1"], "temperature"),
        (["generate", DEMO, "--prompt", "x", "--set", "lower=1"], "STEP.OPTION=VALUE"),
        (["generate", DEMO, "--prompt", "x", "--set", "lowre.prefer=[]"], "did you mean 'lower'"),
        (["recipe", "show", "defualt"], "did you mean 'default'"),
        (["recipe", "check", "none.yaml"], "does not exist"),
    ],
)
def test_an_error_is_one_line_that_says_what_to_do(arguments, message, capsys):
    if arguments[-1] == "":
        # The demo tokenizer starts every text with a token, so an empty prompt is no error.
        assert main([*arguments, "--max-tokens", "1"]) == 0
        return
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("autodeploy: error: ")
    assert err.count("\n") == 1
    assert re.search(message, err)


def test_debug_shows_the_trace():
    with pytest.raises(CheckpointError):
        main(["--debug", "generate", "./nowhere", "--prompt", "x"])


@pytest.mark.parametrize("arguments", [[], ["generate"], ["frobnicate"], ["recipe", "list", "-x"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_changes_are_yaml():
    assert read_changes(["a.x=1", "a.y=[p, q]", "b.z=true"]) == {
        "a": {"x": 1, "y": ["p", "q"]}, "b": {"z": True},
    }  # fmt: skip
    with pytest.raises(ConfigError):
        read_changes(["a=1"])


def test_bench_measures_a_small_model(capsys, tmp_path):
    report = tmp_path / "report.json"
    assert main(["bench", "throughput", "--model", DEMO, "--requests", "3", "--prompt", "4:8",
                 "--output", "2:4", "--against", "generate",
                 "--json", str(report)]) == 0  # fmt: skip
    assert "transformers generate" in capsys.readouterr().out
    names = [r["name"] for r in json.loads(report.read_text())["results"]]
    assert names == ["autodeploy", "transformers generate"]
