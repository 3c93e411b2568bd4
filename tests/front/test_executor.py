"""The engine in a worker process: the same tokens, and a death that everybody hears of."""

import asyncio
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

from autodeploy import AsyncLLM, SamplingParams, deploy
from autodeploy.build import build_engine
from autodeploy.config import DeployConfig
from autodeploy.errors import CheckpointError, EngineDeadError, UnknownTokenError
from autodeploy.runtime.executor import WorkerExecutor
from autodeploy.runtime.messages import EngineRequest, RequestFailed, TokenOutput

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


@pytest.fixture(scope="module")
def worker(model):
    executor = WorkerExecutor(partial(build_engine, DeployConfig(model)))
    yield executor
    executor.shutdown()


def poll_until_done(executor, request_ids):
    events, done = [], set()
    deadline = time.monotonic() + 30
    while done != set(request_ids):
        assert time.monotonic() < deadline
        for event in executor.poll(0.5):
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


def test_a_worker_that_is_killed_ends_every_request_and_cleans_up(model):
    before = set(Path(tempfile.gettempdir()).glob("autodeploy-*"))
    llm = deploy(model, executor="process")
    pid = llm._executor.pid
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    started = time.monotonic()
    with pytest.raises(EngineDeadError, match="killed by SIGKILL"):
        while True:
            llm.generate([[5, 6], [7, 8]], LONG)
    assert time.monotonic() - started < 10
    with pytest.raises(EngineDeadError):
        llm.generate([5], GREEDY)
    llm.shutdown()
    assert set(Path(tempfile.gettempdir()).glob("autodeploy-*")) <= before


async def test_streams_hear_of_a_killed_worker(model):
    engine = AsyncLLM(model, executor="process")
    killed = False
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        async for _ in engine.generate([5, 6], LONG):
            if not killed:
                killed = True
                os.kill(engine._executor.pid, signal.SIGKILL)
    await asyncio.wait_for(engine.shutdown(), 20)


def test_a_build_that_fails_is_raised_as_what_it_was(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no weights"):
        WorkerExecutor(partial(build_engine, DeployConfig(str(tmp_path))))


def fail_to_build():
    raise ZeroDivisionError("while building")


def test_an_unexpected_error_in_the_worker_names_itself():
    with pytest.raises(EngineDeadError, match="ZeroDivisionError: while building"):
        WorkerExecutor(fail_to_build)


def test_the_worker_ends_when_its_parent_is_gone():
    code = (
        "import sys, time\n"
        "from functools import partial\n"
        "from autodeploy.build import build_engine\n"
        "from autodeploy.config import DeployConfig\n"
        "from autodeploy.runtime.executor import WorkerExecutor\n"
        "if __name__ == '__main__':\n"
        "    w = WorkerExecutor(partial(build_engine, DeployConfig('examples/demo_model')))\n"
        "    print(w.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while alive(pid):
        assert time.monotonic() < deadline, "the worker outlives its parent"
        time.sleep(0.1)
