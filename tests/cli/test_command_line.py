"""The command line as a program: statuses, pipes, logs, and values given by --set."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from autodeploy import __version__
from autodeploy.cli.main import main, own_logging, parser
from autodeploy.cli.options import read_changes
from autodeploy.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "examples" / "demo_model")


def test_version_is_the_package_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"autodeploy {__version__}\n"


@pytest.mark.parametrize(
    "path",
    [[], ["generate"], ["recipe"], ["recipe", "show"], ["recipe", "check"], ["env"], ["bench"]],
    ids=" ".join,
)
def test_help_ends_with_examples_that_parse(path, capsys):
    with pytest.raises(SystemExit):
        main([*path, "--help"])
    examples = capsys.readouterr().out.partition("examples:\n")[2]
    commands = re.findall(r"autodeploy ([^|>#\n]+)", examples)
    assert commands
    for command in commands:
        words = [quoted or word for quoted, word in re.findall(r'"([^"]*)"|(\S+)', command)]
        assert parser().parse_args(words).run


@pytest.mark.parametrize(("flags", "level"), [([], "WARNING"), (["-v"], "INFO")])
def test_verbose_logs_more(flags, level):
    with own_logging(parser().parse_args([*flags, "recipe", "list"]).verbose):
        assert logging.getLogger("autodeploy").level == getattr(logging, level)


def test_after_a_command_logging_is_as_it_was(caplog):
    assert main(["recipe", "list"]) == 0
    assert main(["serve", DEMO, "--port", "0", "--ray"]) == 1  # it sets up the root logger
    with caplog.at_level(logging.INFO):
        logging.getLogger("autodeploy.part").info("a sentence")
    assert caplog.messages == ["a sentence"]


@pytest.mark.parametrize("terminal", [False, True])
def test_logs_go_to_standard_error_only(terminal, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with own_logging(True):
        logging.getLogger("autodeploy").info("a sentence")
    out, err = capsys.readouterr()
    assert "a sentence" in err
    assert "a sentence" not in out


def test_a_reader_who_leaves_early_is_no_error_message():
    read_end, write_end = os.pipe()
    os.close(read_end)
    out = subprocess.run(
        [sys.executable, "-m", "autodeploy", "recipe", "show", "default"],
        stdout=write_end, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    os.close(write_end)
    assert (out.returncode, out.stderr) == (1, "")


def test_an_interrupt_exits_with_130(capsys, monkeypatch):
    class Interrupted:
        buffer = property(lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        isatty = staticmethod(lambda: False)

    monkeypatch.setattr(sys, "stdin", Interrupted())
    assert main(["generate", DEMO]) == 130
    assert capsys.readouterr() == ("", "autodeploy: interrupted\n")


@pytest.mark.parametrize("change", ["lower.prefer=[a", "lower.prefer={a: ", "lower.prefer=*x"])
def test_a_set_value_that_is_not_yaml_is_named(change, capsys):
    with pytest.raises(ConfigError, match="not YAML"):
        read_changes([change])
    assert main(["recipe", "show", "default", "--set", change]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert change in err


def test_the_last_of_two_changes_of_one_option_wins():
    assert read_changes(["a.x=1", "a.x=2"]) == {"a": {"x": 2}}


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("steps: [\n a: b: c", "not YAML"),
        ("extends: default\ndorp: [compile]", "did you mean 'drop'"),
        (
            "steps: [canonicalize, load, fuse_parallel_linears]",
            "put 'fuse_parallel_linears' before 'load'",
        ),
        ("extends: default\ndrop: [nothing]", "no step 'nothing'"),
    ],
)
def test_check_says_in_one_line_what_is_wrong_with_a_recipe(yaml, message, capsys, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml)
    assert main(["recipe", "check", str(file)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.search(message, err)


def test_a_shown_recipe_is_a_recipe_with_the_same_steps(capsys, tmp_path):
    assert main(["recipe", "show", "default"]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    assert main(["recipe", "check", str(shown)]) == 0
    steps = capsys.readouterr().out.partition(": ")[2]
    assert main(["recipe", "check", "default"]) == 0
    assert capsys.readouterr().out.endswith(steps)


def test_env_on_a_terminal_tells_the_same_facts(capsys, monkeypatch):
    assert main(["env"]) == 0
    names = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["env"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in names)
