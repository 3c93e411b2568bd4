"""`autodeploy serve` as people run it: a process with an engine in another one, and signals."""

import json
import signal
import subprocess
import sys

import httpx
import psutil
import pytest
from running_server import DEMO, eventually
from served_process import Served


@pytest.fixture
def served():
    made = []

    def make(*flags, **options):
        made.append(Served(*flags, **options))
        return made[-1]

    yield make
    for one in made:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


def test_sigterm_lets_an_open_stream_finish_and_exits_with_0(served):
    one = served("--max-num-seqs", "8")
    assert httpx.get(f"{one.url}/v1/models").status_code == 401
    assert one.client.get("/v1/models").status_code == 200
    engine = one.engine()
    with one.stream(max_tokens=300) as stream:
        lines = stream.iter_lines()
        next(lines)
        one.process.send_signal(signal.SIGTERM)
        eventually(lambda: httpx.get(f"{one.url}/ready").status_code == 503)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert one.end()[0] == 0
    assert not engine.is_running()


def test_a_killed_engine_is_told_within_a_second_and_the_server_exits_with_1(served):
    one = served("--max-num-seqs", "8")
    with one.stream() as stream:
        lines = stream.iter_lines()
        next(lines)
        one.engine().kill()
        rest = [line for line in lines if line]
    error = json.loads(rest[-2].removeprefix("data: "))["error"]
    assert error["code"] == "engine_dead"
    assert "SIGKILL" in error["message"]
    status, errors = one.end()
    assert status == 1
    assert "the engine died" in errors
    assert "of-the-environment" not in errors


def test_a_killed_engine_comes_back_if_that_is_the_policy(served, tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text(f"model: {DEMO}\nmax-num-seqs: 8\non_engine_death: restart\nport: 1\n")
    one = served("--config", str(file), "--set", "served-model-name=[mine]", model=None)
    assert one.client.get("/v1/models").json()["data"][0]["id"] == "mine"
    with one.stream() as stream:
        lines = stream.iter_lines()
        next(lines)
        one.engine().kill()
        assert "engine_dead" in "".join(lines)
    assert one.client.get("/health").status_code == 503
    eventually(lambda: one.client.get("/health").status_code == 200, 30)
    assert one.client.post("/v1/completions", json={"prompt": "a"}).status_code == 200
    one.process.send_signal(signal.SIGINT)
    assert one.end()[0] == 0


def test_a_server_that_stops_does_not_wait_for_an_engine_that_is_starting_again(served, tmp_path):
    one = served(
        "--max-num-seqs", "8", "--on-engine-death", "restart", environment={"TMPDIR": str(tmp_path)}
    )
    dead = one.engine()
    dead.kill()
    eventually(lambda: one.client.get("/health").status_code == 503)
    eventually(lambda: [engine for engine in one.engines() if engine != dead])
    starting = one.engine()
    one.process.send_signal(signal.SIGTERM)
    status, errors = one.end()
    assert status == 0
    assert "Traceback" not in errors
    assert "the engine is back" not in errors
    assert not starting.is_running()
    assert not list(tmp_path.glob("autodeploy-*"))


def test_a_compilation_ends_with_the_engine_that_asked_for_it(served, tmp_path):
    """Which is killed in the middle of it."""
    command = [sys.executable, "-m", "autodeploy.compile_checkpoint", "30"]
    script = f"import os, subprocess; subprocess.run({command} + [str(os.getpid())])"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) as asking:
        eventually(lambda: psutil.Process(asking.pid).children())
        (compiling,) = psutil.Process(asking.pid).children()
        asking.kill()
        eventually(lambda: not compiling.is_running())
