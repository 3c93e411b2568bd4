"""The engine in a worker process: the same tokens, and a death that everybody hears of."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from autodeploy import SamplingParams, deploy
from autodeploy.build import build_engine
from autodeploy.config import DeployConfig
from autodeploy.errors import CheckpointError, EngineDeadError, UnknownTokenError
from autodeploy.runtime.executor import WorkerExecutor
from autodeploy.runtime.messages import EngineRequest, RequestFailed, TokenOutput, one_by_one

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
ROOT = Path(__file__).resolve().parents[2]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A killed child that nobody waited for still answers.
    return Path(f"/proc/{pid}/status").read_text().split("State:")[1].split()[0] != "Z"


@pytest.fixture
def worker(process_llm):
    return process_llm._executor


def poll_until_done(executor, request_ids):
    events, done = [], set()
    deadline = time.monotonic() + 30
    while done != set(request_ids):
        assert time.monotonic() < deadline
        for event in one_by_one(executor.poll(0.5)):
            events.append(event)
            failed = isinstance(event, RequestFailed)
            if failed or (isinstance(event, TokenOutput) and event.finish_reason):
                done.add(event.request_id)
    return events


def test_a_worker_gives_the_tokens_of_the_same_engine_in_process(worker, llm):
    prompts = [[5, 6, 7], [8, 9], list(range(3, 60))]
    expected = [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY)]
    for index, prompt in enumerate(prompts):
        worker.submit(EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=GREEDY))
    events = poll_until_done(worker, ["0", "1", "2"])
    for index, tokens in enumerate(expected):
        found = [e for e in events if isinstance(e, TokenOutput) and e.request_id == str(index)]
        assert [t for e in found for t in e.token_ids] == tokens
    assert worker.ready.vocab_size == 300
    assert worker.ready.summary["rung"].startswith("1 ")


def test_a_request_the_engine_refuses_fails_alone(worker):
    worker.submit(EngineRequest(request_id="good", prompt_token_ids=[5], params=GREEDY))
    worker.submit(EngineRequest(request_id="bad", prompt_token_ids=[5, 999], params=GREEDY))
    events = poll_until_done(worker, ["good", "bad"])
    (failed,) = [e for e in events if isinstance(e, RequestFailed)]
    assert (failed.request_id, failed.error) == ("bad", UnknownTokenError.__name__)


def test_an_aborted_request_ends_with_abort(worker):
    worker.submit(EngineRequest(request_id="long", prompt_token_ids=[5], params=LONG))
    worker.poll(5)
    worker.abort(["long"])
    assert poll_until_done(worker, ["long"])[-1]
    worker.abort(["long", "unknown"])


def test_text_chat_and_counters_are_those_of_an_engine_in_process(process_llm, llm):
    params = GREEDY.clone(stop=["e"], logprobs=2, prompt_logprobs=1)
    for prompt in ("the quick brown", "fox"):
        (here,), (there,) = llm.generate(prompt, params), process_llm.generate(prompt, params)
        assert there.outputs == here.outputs
        assert there.prompt_logprobs == here.prompt_logprobs
    message = [{"role": "user", "content": "fox"}]
    assert process_llm.chat(message, GREEDY)[0].outputs == llm.chat(message, GREEDY)[0].outputs
    stats = process_llm.stats
    assert stats.step > 0
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)


def test_a_checkpoint_in_a_worker_that_is_killed(model, llm, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTODEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    model.save_pretrained(tmp_path / "checkpoint")
    with deploy(tmp_path / "checkpoint", executor="process") as other:
        prompts = [[5, 6], [7, 8, 9]]
        expected = [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY)]
        assert [o.outputs[0].token_ids for o in other.generate(prompts, GREEDY)] == expected
        threading.Timer(0.3, os.kill, (other._executor.pid, signal.SIGKILL)).start()
        started = time.monotonic()
        with pytest.raises(EngineDeadError, match="killed by SIGKILL"):
            while True:
                other.generate(prompts, LONG)
        assert time.monotonic() - started < 10
        for _ in range(2):
            with pytest.raises(EngineDeadError, match="killed by SIGKILL"):
                other.generate([5], GREEDY)
    with pytest.raises(EngineDeadError, match="was shut down"):
        other.generate([5], GREEDY)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_build_that_fails_is_raised_as_what_it_was(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no weights"):
        WorkerExecutor(partial(build_engine, DeployConfig(str(tmp_path))))


def fail_to_build():
    raise ZeroDivisionError("while building")


def test_an_unexpected_error_in_the_worker_names_itself_and_is_told_once(capfd):
    with pytest.raises(EngineDeadError, match=r"test_executor.py:\d+: ZeroDivisionError: while"):
        WorkerExecutor(fail_to_build)
    assert "Traceback" not in capfd.readouterr().err


PARENT = """
import multiprocessing, threading, time
from functools import partial
from autodeploy.runtime.executor import WorkerExecutor

def tell():
    while not multiprocessing.active_children():
        time.sleep(0.01)
    print(multiprocessing.active_children()[0].pid, flush=True)

threading.Thread(target=tell).start()
WorkerExecutor(partial(time.sleep, 60))
"""


def test_a_worker_ends_with_its_parent_even_while_it_builds(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while alive(pid):
        assert time.monotonic() < deadline, "the worker outlives its parent"
        time.sleep(0.1)
    assert list(tmp_path.iterdir()) == []
