"""Where settings of `autodeploy serve` come from, and which of them wins."""

import json
import socket

import pytest

from autodeploy.cli.main import main, parser
from autodeploy.cli.serve import read_settings
from autodeploy.errors import ConfigError


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    monkeypatch.delenv("AUTODEPLOY_API_KEY", raising=False)


def settings(*words):
    return read_settings(parser().parse_args(["serve", *words]))


def write(tmp_path, text):
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    return str(file)


def test_file_beats_default_flag_beats_file_and_set_beats_flag(tmp_path):
    file = write(tmp_path, "port: 1\nmax-n: 2\nmax_num_seqs: 3\nmax-logprobs: 4\nmodel: a\n")
    found = settings("--config", file, "--max-n", "20", "--max-logprobs", "40", "--set",
                     "max-logprobs=400")  # fmt: skip
    server = found.server
    assert (server.port, server.max_n, server.max_logprobs) == (1, 20, 400)
    assert (server.host, found.model) == ("127.0.0.1", "a")
    assert found.deploy == {
        "max_num_seqs": 3, "executor": "process", "max_num_batched_tokens": 2048, "overrides": {}
    }  # fmt: skip


def test_steps_of_a_server_are_short_unless_it_is_told_otherwise():
    assert settings("model").deploy["max_num_batched_tokens"] == 2048
    longer = settings("model", "--max-num-batched-tokens", "8192")
    assert longer.deploy["max_num_batched_tokens"] == 8192


def test_options_of_recipe_steps_are_joined_from_file_and_set(tmp_path):
    file = write(tmp_path, "overrides: {compile: {backend: 'off', x: 1}, lower: {prefer: [a]}}")
    found = settings("m", "--config", file, "--set", "compile.backend=inductor")
    assert found.deploy["overrides"] == {
        "compile": {"backend": "inductor", "x": 1}, "lower": {"prefer": ["a"]},
    }  # fmt: skip


def test_keys_come_from_the_environment_unless_given(monkeypatch):
    monkeypatch.setenv("AUTODEPLOY_API_KEY", "a, b")
    assert settings("m").server.api_key == ["a", "b"]
    assert settings("m", "--api-key", "c", "d").server.api_key == ["c", "d"]
    assert settings("m", "--api-key", "c", "--api-key", "d").server.api_key == ["c", "d"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no model"),
        (["m", "--set", "prot=1"], "did you mean 'port'"),
        (["m", "--set", "port"], "NAME=VALUE"),
        (["m", "--set", "port=a"], "port"),
        (["m", "--port", "70000"], "port"),
        (["m", "--max-n", "0"], "max_n"),
        (["m", "--on-engine-death", "cry"], "exit or restart"),
        (["m", "--root-path", "a"], "root_path"),
        (["m", "--ssl-keyfile", "a"], "ssl_certfile"),
        (["m", "--ssl-certfile", "/nowhere.pem"], "not a file"),
        (["m", "--request-timeout", "0"], "request_timeout"),
        (["m", "--set", "max_num_seqs=0"], "max_num_seqs"),
        (["m", "--config", "/nowhere.yaml"], "cannot be read"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_loaded(words, message, capsys):
    with pytest.raises(ConfigError, match=message):
        settings(*words)
    assert main(["serve", *words]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "no-such-model", "--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert f"port {port}" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["- a", "a: [", "prot: 1", "port: a", "api_key: one"])
def test_a_wrong_file_is_named(text, tmp_path):
    with pytest.raises(ConfigError):
        settings("m", "--config", write(tmp_path, text))


def test_the_schema_describes_every_setting(capsys):
    assert main(["serve", "--print-schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    properties = schema["properties"]
    assert schema["additionalProperties"] is False
    assert properties["port"]["default"] == 8000
    assert properties["executor"]["default"] == "process"
    for name in ("model", "max_num_seqs", "api_key", "overrides", "served_model_name"):
        assert name in properties
    assert all(properties[name].get("description") for name in ("port", "max_num_batched_tokens"))
