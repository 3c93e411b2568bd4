"""Ctrl-C, threads, kills and scripts that never say goodbye: nothing hangs, nothing is lost."""

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from autodeploy import LLM, AsyncLLM, SamplingParams, deploy
from autodeploy.build import build_engine
from autodeploy.config import DeployConfig
from autodeploy.errors import CheckpointError, ConfigError, EngineDeadError, UnknownTokenError
from autodeploy.runtime.executor import InProcessExecutor
from autodeploy.runtime.messages import EngineRequest, RequestFailed, TokenOutput

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["llm", "process_llm"])
def executor(request):
    return request.getfixturevalue(request.param)._executor


def request(name, prompt, params=GREEDY):
    return EngineRequest(request_id=name, prompt_token_ids=prompt, params=params)


def last_event(executor, name):
    while True:
        for event in executor.poll(30):
            failed = isinstance(event, RequestFailed)
            if failed or (isinstance(event, TokenOutput) and event.finish_reason):
                assert event.request_id == name
                return event


def test_a_refused_request_is_an_event_in_every_executor(executor):
    executor.submit(request("bad", [5, 999]))
    failed = last_event(executor, "bad")
    assert (failed.error, "999" in failed.message) == (UnknownTokenError.__name__, True)


def test_a_poll_that_waits_serves_what_another_thread_submits(executor):
    found = []
    poller = threading.Thread(target=lambda: found.append(last_event(executor, "late")))
    poller.start()
    executor.submit(request("late", [5, 6]))
    poller.join(20)
    assert not poller.is_alive()
    assert found[0].finish_reason == "length"


def test_wake_ends_a_wait(executor):
    poller = threading.Thread(target=executor.poll, args=(600,))
    poller.start()
    while poller.is_alive():
        executor.wake()
        poller.join(0.05)


def test_ctrl_c_waits_for_the_end_of_the_step(model, monkeypatch):
    executor = InProcessExecutor(partial(build_engine, DeployConfig(model)))
    engine, step = executor._engine, executor._engine.step

    def interrupted():
        signal.raise_signal(signal.SIGINT)
        return step()

    executor.submit(request("one", [5, 6]))
    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        executor.poll(1)
    assert engine.stats().generated_tokens == 1
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert last_event(executor, "one").finish_reason == "length"
    executor.shutdown()


def test_ctrl_c_of_the_terminal_does_not_end_the_worker(process_llm):
    os.kill(process_llm._executor.pid, signal.SIGINT)
    assert len(process_llm.generate([5, 6], GREEDY)[0].outputs[0].token_ids) == 6


@pytest.mark.parametrize("when", ["submit", "poll"])
def test_ctrl_c_at_any_call_leaves_nothing_in_the_engine(executor, when, monkeypatch):
    llm = LLM.from_parts(executor)
    plain, calls = getattr(executor, when), []

    def interrupted(argument):
        result = plain(argument)
        calls.append(argument)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(executor, when, interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5, 6, 7], [8, 9], [3]], LONG)
    monkeypatch.undo()
    assert len(llm.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids) == 6
    assert (llm.stats.running, llm.stats.waiting, llm.stats.pages_used) == (0, 0, 0)
    llm._closed = True  # the executor is everybody's


def test_threads_that_share_an_llm_each_get_their_own_tokens(llm):
    prompts = [[3 + i, 40 + i] for i in range(6)]
    expected = [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY)]
    found = {}

    def generate(index):
        found[index] = llm.generate(prompts[index], GREEDY)[0].outputs[0].token_ids

    threads = [threading.Thread(target=generate, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [found[i] for i in range(len(prompts))] == expected


async def test_every_stream_hears_of_a_killed_worker(model):
    async with AsyncLLM(model, executor="process") as engine:

        async def read(prompt):
            async for _ in engine.generate(prompt, LONG):
                started.set()

        started = asyncio.Event()
        tasks = [asyncio.create_task(read([5 + i])) for i in range(5)]
        await asyncio.wait_for(started.wait(), 20)
        os.kill(engine._executor.pid, signal.SIGKILL)
        ends = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
        assert [type(end) for end in ends] == [EngineDeadError] * 5
        with pytest.raises(EngineDeadError, match="killed by SIGKILL"):
            await read([9])


async def test_an_idle_engine_that_dies_refuses_the_next_request(model):
    async with AsyncLLM(model, executor="process") as engine:
        os.kill(engine._executor.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(anext(engine.generate([5], LONG)), 20)


async def test_a_stream_that_fails_takes_its_other_sequences_along(model):
    # Token 77 breaks the sequence that meets it; each of the two meets it at another time.
    weight = model.get_input_embeddings().weight
    kept = weight[77].detach().clone()
    weight.data[77] = float("nan")
    try:
        executor = InProcessExecutor(partial(build_engine, DeployConfig(model)))
        params = SamplingParams(
            n=2, seed=3, max_tokens=200, allowed_token_ids=[77, 40], logit_bias={77: -2.0},
            detokenize=False, ignore_eos=True,
        )  # fmt: skip
        async with AsyncLLM.from_parts(executor) as engine:
            with pytest.raises(Exception, match="cannot go on"):
                async for _ in engine.generate([5, 6], params):
                    pass
            while executor._engine.has_work:
                await asyncio.sleep(0.01)
            assert executor._engine.stats().aborted == 1
    finally:
        weight.data[77] = kept


async def test_each_of_several_sequences_ends_once_in_a_stream(model, tokenizer):
    executor = InProcessExecutor(partial(build_engine, DeployConfig(model)))
    params = SamplingParams(n=3, seed=1, max_tokens=40, stop=["a", "e", "o"], ignore_eos=True)
    async with AsyncLLM.from_parts(executor, tokenizer) as engine:
        texts, ends = ["", "", ""], []
        async for part in engine.generate("the", params):
            for completion in part.outputs:
                texts[completion.index] += completion.text
                ends += [completion.index] if completion.finished else []
        assert sorted(ends) == [0, 1, 2]
        (whole,) = [o async for o in engine.generate("the", params, output_kind="final")]
        assert [c.text for c in whole.outputs] == texts
        assert [c.index for c in whole.outputs] == [0, 1, 2]


async def test_a_request_id_can_be_used_again_at_once(model, tokenizer):
    executor = InProcessExecutor(partial(build_engine, DeployConfig(model)))
    async with AsyncLLM.from_parts(executor, tokenizer) as engine:
        plain = [p async for p in engine.generate("the", LONG, "mine", output_kind="final")]
        stop = plain[0].outputs[0].text[10:12]
        for _ in range(20):
            stream = engine.generate("the", LONG.clone(stop=[stop]), "mine", output_kind="final")
            reasons = [p.outputs[0].finish_reason async for p in stream]
            assert reasons == ["stop"]


def test_a_model_that_cannot_be_sent_says_what_to_use_instead(model):
    hook = model.register_forward_hook(lambda *args: None)
    try:
        with pytest.raises(ConfigError, match="executor='inprocess'"):
            deploy(model, executor="process")
    finally:
        hook.remove()


def test_a_tokenizer_that_cannot_be_loaded_leaves_no_worker_behind(model, tmp_path):
    before = multiprocessing.active_children()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        LLM(model, tokenizer=str(tmp_path), executor="process")
    assert multiprocessing.active_children() == before


SCRIPT = """
from autodeploy import LLM, SamplingParams
{guard}
    llm = LLM("examples/demo_model", executor="process", max_model_len=64)
    print(len(llm.generate([[5, 6]], SamplingParams(max_tokens=3))))
"""


def run_script(tmp_path, code, **environment):
    script = tmp_path / "script.py"
    script.write_text(code)
    return subprocess.run(
        [sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True, timeout=60,
        check=False, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


def test_a_script_that_never_shuts_down_ends_all_the_same(tmp_path):
    done = run_script(tmp_path, SCRIPT.format(guard="if __name__ == '__main__':"))
    assert (done.returncode, done.stdout) == (0, "1\n")
    assert "Error" not in done.stderr


KILLED = """
import asyncio, os, signal
from autodeploy import AsyncLLM, SamplingParams
from autodeploy.errors import EngineDeadError

async def main():
    llm = AsyncLLM("examples/demo_model", executor="process", max_model_len=64)
    try:
        async for _ in llm.generate([5, 6], SamplingParams(max_tokens=50, ignore_eos=True)):
            os.kill(llm._executor.pid, signal.SIGKILL)
    except EngineDeadError as error:
        print(error)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_a_script_whose_worker_is_killed_ends_without_a_word_more(tmp_path):
    (tmp_path / "temporary").mkdir()
    done = run_script(tmp_path, KILLED, TMPDIR=str(tmp_path / "temporary"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "was killed by SIGKILL" in done.stdout
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    done = run_script(tmp_path, SCRIPT.format(guard="if True:"))
    assert done.returncode == 1
    assert "EngineDeadError" in done.stderr.splitlines()[-1]
    assert "if __name__ == '__main__':" in done.stderr.splitlines()[-1]
