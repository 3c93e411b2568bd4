"""`autodeploy serve` as people run it: a process with an engine in another one, and signals."""

import json
import os
import re
import signal
import subprocess
import sys

import httpx
import psutil
import pytest
from running_server import DEMO, eventually

LONG = {"prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True}


class Served:
    """`autodeploy serve` of the demo model with some flags."""

    def __init__(self, *flags, model=DEMO):
        command = [sys.executable, "-m", "autodeploy", "serve", *([model] if model else [])]
        environment = {**os.environ, "AUTODEPLOY_API_KEY": "of-the-environment"}
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--device", "cpu", *flags],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        line = self.process.stdout.readline()
        self.url = re.search(r"https?://\S+", line)[0] if "://" in line else line
        self.client = httpx.Client(
            base_url=self.url, timeout=30, headers={"Authorization": "Bearer of-the-environment"}
        )

    def engine(self):
        """The process of the engine."""
        children = psutil.Process(self.process.pid).children()
        return max(children, key=lambda child: child.memory_info().rss)

    def stream(self, **fields):
        return self.client.stream("POST", "/v1/completions", json={**LONG, **fields})

    def end(self):
        """Exit status and what was printed on standard error."""
        self.client.close()
        _, errors = self.process.communicate(timeout=20)
        return self.process.returncode, errors


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
