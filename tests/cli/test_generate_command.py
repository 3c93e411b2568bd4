"""`autodeploy generate` on a saved checkpoint: where prompts come from and where results go."""

import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_model
from toy_tokenizers import CHAT_TEMPLATE, byte_level

from autodeploy.cli.main import main
from autodeploy.errors import SamplingParamsError

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--max-tokens", "6"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = byte_level(chat_template=CHAT_TEMPLATE)
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def own_logger_and_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("AUTODEPLOY_CACHE", str(tmp_path_factory.getbasetemp() / "generate-cache"))
    logger = logging.getLogger("autodeploy")
    for name in ("handlers", "level", "propagate"):
        monkeypatch.setattr(logger, name, getattr(logger, name))


def give_on_standard_input(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def records(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def error_of(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("autodeploy: error: ")
    assert err.count("\n") == 1
    return err


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(checkpoint, capsys):
    tokens = []
    for seed in ("7", "7", "8"):
        assert main(["generate", checkpoint, "--prompt", "the quick", "--seed", seed, "--json",
                     "--temperature", "5", "--max-tokens", "12"]) == 0  # fmt: skip
        tokens.append(records(capsys)[0]["token_ids"])
    assert tokens[0] == tokens[1] != tokens[2]


def test_a_json_record_tells_the_metrics_of_its_request(checkpoint, capsys):
    assert main(["generate", checkpoint, "--prompt", "the quick", "--json", *SHORT]) == 0
    (record,) = records(capsys)
    assert record["prompt"] == "the quick"
    assert record["error"] is None
    assert record["metrics"]["arrival_time"] <= record["metrics"]["first_token_time"]
    assert record["metrics"]["first_token_time"] <= record["metrics"]["finished_time"]


def test_standard_input_is_one_prompt_with_its_inner_line_breaks(checkpoint, capsys, monkeypatch):
    give_on_standard_input(monkeypatch, "größer\nals Ω\n".encode())
    assert main(["generate", checkpoint, "--json", *SHORT]) == 0
    assert [r["prompt"] for r in records(capsys)] == ["größer\nals Ω"]


def test_a_prompt_file_has_one_prompt_per_line_and_nothing_else_ends_a_line(
    checkpoint, capsys, tmp_path
):
    file = tmp_path / "prompts.txt"
    file.write_bytes("the\x0cquick\r\n\nlazy\u2028dog".encode())
    assert main(["generate", checkpoint, "--prompt-file", str(file), "--json", *SHORT]) == 0
    assert [r["prompt"] for r in records(capsys)] == ["the\x0cquick", "lazy\u2028dog"]


def test_chat_puts_the_prompt_into_the_template(checkpoint, capsys):
    assert main(["generate", checkpoint, "--chat", "--prompt", "add 1", "--json", *SHORT]) == 0
    assert records(capsys)[0]["prompt"] == "user: add 1\nassistant: "


def test_several_texts_are_told_apart_by_their_prompts(checkpoint, capsys):
    assert main(["generate", checkpoint, "--prompt", "the", "--prompt", "def", *SHORT]) == 0
    out = capsys.readouterr().out
    assert out.index("--- 'the'") < out.index("--- 'def'")


def test_one_prompt_on_a_terminal_streams_the_same_text(checkpoint, capsys, monkeypatch):
    command = ["generate", checkpoint, "--prompt", "the", "--temperature", "0", *SHORT]
    assert main([*command, "--no-stream"]) == 0
    whole = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(command) == 0
    assert capsys.readouterr().out == whole


def test_deployment_flags_reach_the_engine(checkpoint, capsys):
    assert main(["generate", checkpoint, "--prompt", "the quick brown", "--max-model-len", "4",
                 "--block-size", "4", "--max-num-seqs", "2", "--max-num-batched-tokens", "8",
                 "--no-enable-prefix-caching", "--dtype", "float32", "--device", "cpu",
                 "--executor", "inprocess"]) == 1  # fmt: skip
    assert "maximum context length is 4" in error_of(capsys)


@pytest.mark.parametrize("flags", [["--stream", "--json"], ["--stream", "--n", "2"],
                                   ["--stream", "--prompt", "b"]])  # fmt: skip
def test_a_stream_that_cannot_be_is_refused_and_not_ignored(flags, capsys):
    assert main(["generate", "./nowhere", "--prompt", "a", *flags]) == 1
    assert "--stream" in error_of(capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "nan"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--n", "2", "--temperature", "0"], "n=2"),
        (["--stop", ""], "empty string"),
    ],
)
def test_senseless_sampling_is_refused_before_the_checkpoint_is_looked_for(flags, message, capsys):
    assert main(["generate", "./nowhere", "--prompt", "a", *flags]) == 1
    assert message in error_of(capsys)


@pytest.mark.parametrize(
    ("data", "message"), [(b"", "no prompts"), (b"\n\n", "no prompts"), (b"a\xff", "not UTF-8")]
)
def test_a_prompt_file_without_prompts_never_falls_through_to_standard_input(
    data, message, capsys, tmp_path, monkeypatch
):
    file = tmp_path / "prompts.txt"
    file.write_bytes(data)
    give_on_standard_input(monkeypatch, b"the quick")
    assert main(["generate", "./nowhere", "--prompt-file", str(file)]) == 1
    assert message in error_of(capsys)


@pytest.mark.parametrize(
    ("data", "message"), [(b"", "standard input is empty"), (b"\xff", "standard input is not UTF")]
)
def test_unusable_standard_input_is_an_error(data, message, capsys, monkeypatch):
    give_on_standard_input(monkeypatch, data)
    assert main(["generate", "./nowhere"]) == 1
    assert message in error_of(capsys)


def test_a_missing_prompt_file_is_named(capsys, tmp_path):
    assert main(["generate", "./nowhere", "--prompt-file", str(tmp_path / "none.txt")]) == 1
    assert "none.txt" in error_of(capsys)


def test_debug_raises_what_would_have_been_one_line():
    with pytest.raises(SamplingParamsError):
        main(["--debug", "generate", "./nowhere", "--prompt", "a", "--min-p", "2"])


def test_the_process_prints_one_line_or_with_debug_the_trace():
    command = [sys.executable, "-m", "autodeploy"]
    failing = ["generate", "./nowhere", "--prompt", "a", "--min-p", "2"]
    short, full = (
        subprocess.run([*command, *debug, *failing], capture_output=True, text=True, cwd=ROOT)
        for debug in ([], ["--debug"])
    )
    assert (short.returncode, full.returncode) == (1, 1)
    assert short.stderr.count("\n") == 1
    assert "Traceback" in full.stderr
    assert short.stdout == full.stdout == ""
