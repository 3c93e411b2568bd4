"""AsyncLLM: streams that can be left, cancelled and aborted, and that learn of the engine's end."""

import asyncio

import pytest
from held_pages import pages_used

from autodeploy import AsyncLLM, SamplingParams
from autodeploy.build import build_engine
from autodeploy.config import DeployConfig
from autodeploy.errors import (
    EmptyPromptError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    SamplingParamsError,
)
from autodeploy.runtime.executor import InProcessExecutor

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


@pytest.fixture
async def engine(model, tokenizer):
    executor = InProcessExecutor(lambda: build_engine(DeployConfig(model, max_num_seqs=64)))
    async with AsyncLLM.from_parts(executor, tokenizer) as deployed:
        yield deployed


async def until(condition):
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come about within 5 seconds")


async def free(engine):
    await until(lambda: engine.open_requests == 0)
    await until(lambda: engine.open_tokens == 0)
    await until(lambda: pages_used_now(engine) == 0)


def pages_used_now(engine):
    executor = engine._executor
    with executor._work:
        return pages_used(engine)


async def collect(stream):
    return [part async for part in stream]


async def test_deltas_join_to_the_text_that_llm_gives(engine, llm):
    # Many tokens: those that come while nobody reads are told together.
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    expected = llm.generate("the quick brown", params)[0].outputs[0]
    parts = await collect(engine.generate("the quick brown", params))
    assert "".join(p.outputs[0].text for p in parts) == expected.text
    assert [t for p in parts for t in p.outputs[0].token_ids] == expected.token_ids
    assert [p.finished for p in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].outputs[0].finish_reason == "length"
    assert len(parts) > 3


async def test_cumulative_and_final_outputs(engine):
    cumulative = await collect(engine.generate("fox", GREEDY, output_kind="cumulative"))
    texts = [p.outputs[0].text for p in cumulative]
    assert all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False))
    (final,) = await collect(engine.generate("fox", GREEDY, output_kind="final"))
    assert final.outputs[0].text == texts[-1]


async def test_a_stop_string_is_never_streamed_not_even_in_part(engine):
    plain = "".join([p.outputs[0].text async for p in engine.generate("the", LONG)])
    stop = plain[20:26]
    shown = ""
    async for part in engine.generate("the", LONG.clone(stop=[stop])):
        shown += part.outputs[0].text
        assert plain[: plain.index(stop)].startswith(shown)
    assert shown == plain[: plain.index(stop)]
    await free(engine)


async def test_many_streams_at_once_each_get_their_own(engine, llm):
    prompts = [[3 + i, 4 + i, 5 + i] for i in range(50)]
    expected = [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY)]
    streams = [collect(engine.generate(p, GREEDY, output_kind="final")) for p in prompts]
    found = [parts[-1].outputs[0].token_ids for parts in await asyncio.gather(*streams)]
    assert found == expected
    await free(engine)


async def test_leaving_the_loop_ends_the_request(engine):
    stream = engine.generate("the", LONG)
    async for _ in stream:
        break
    await stream.aclose()
    await free(engine)


async def test_cancelling_the_task_ends_the_request(engine):
    task = asyncio.create_task(collect(engine.generate("the", LONG)))
    await until(lambda: pages_used_now(engine) > 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await free(engine)


async def test_open_tokens_are_those_of_prompts_and_outputs_until_the_stream_ends(engine):
    assert engine.open_tokens == 0
    params = SamplingParams(max_tokens=150, ignore_eos=True, n=2)
    stream = engine.generate("def f(", params)
    output = await anext(stream)
    prompt = len(output.prompt_token_ids)
    assert 2 * prompt < engine.open_tokens <= 2 * (prompt + 150)
    before = engine.open_tokens
    await anext(stream)
    assert engine.open_tokens >= before
    await stream.aclose()
    await free(engine)
    await collect(engine.generate("def f(", SamplingParams(stop=["e"], max_tokens=100)))
    await collect(engine.generate("def f(", params, output_kind="final"))
    await free(engine)


async def test_abort_ends_the_stream_with_its_reason(engine):
    parts = []
    async for part in engine.generate("the", LONG, "mine"):
        parts.append(part)
        if len(parts) == 2:
            await engine.abort("mine")
            await engine.abort("nobody's")
    assert parts[-1].outputs[0].finish_reason == "abort"
    assert len(parts) < 150
    await free(engine)


async def test_bad_requests_are_refused_and_the_others_go_on(engine):
    running = asyncio.create_task(collect(engine.generate("the", LONG, "taken")))
    await until(lambda: engine.open_requests == 1)
    for prompt, error in ((None, InvalidRequestError), ([], InvalidRequestError)):
        with pytest.raises(error):
            await collect(engine.generate(prompt, GREEDY))
    with pytest.raises(EmptyPromptError):
        await collect(engine.generate({"prompt_token_ids": []}, GREEDY))
    with pytest.raises(InvalidRequestError, match="output_kind"):
        await collect(engine.generate("x", GREEDY, output_kind="words"))
    with pytest.raises(SamplingParamsError):
        await collect(engine.generate("x", SamplingParams(bad_words=["a"], allowed_token_ids=[])))
    assert (await running)[-1].finished


async def test_a_request_id_is_taken_only_while_it_runs(engine):
    first = engine.generate("the", LONG, "mine")
    await anext(first)
    with pytest.raises(InvalidRequestError, match="'mine' is in use"):
        await collect(engine.generate("the", GREEDY, "mine"))
    await first.aclose()
    await until(lambda: engine.open_requests == 0)
    assert (await collect(engine.generate("the", GREEDY, "mine")))[-1].finished


async def test_chat_streams_one_conversation(engine, llm):
    message = [{"role": "user", "content": "fox"}]
    parts = await collect(engine.chat(message, GREEDY))
    expected = llm.chat(message, GREEDY)[0].outputs[0].text
    assert "".join(p.outputs[0].text for p in parts) == expected
    with pytest.raises(InvalidRequestError, match="takes one conversation, not 2"):
        engine.chat([message, message], GREEDY)


async def test_a_request_that_fails_leaves_the_other_streams_untouched(poisoned, llm):
    expected = llm.generate("the", LONG)[0].outputs[0].text
    async with AsyncLLM.from_parts(Shared(poisoned._executor), poisoned.tokenizer) as engine:
        running = asyncio.create_task(collect(engine.generate("the", LONG)))
        await until(lambda: engine.open_requests == 1)
        with pytest.raises(EngineError, match="NaN"):
            await collect(engine.generate([5, 77], GREEDY))
        assert "".join(p.outputs[0].text for p in await running) == expected
        await free(engine)


class Shared:
    """An executor that others go on using after a front is shut down."""

    def __init__(self, executor):
        self._executor = executor

    def __getattr__(self, name):
        return getattr(self._executor, name)

    def shutdown(self):
        pass


async def test_several_calls_of_shutdown_all_wait_for_the_end(model):
    executor = InProcessExecutor(lambda: build_engine(DeployConfig(model)))
    engine = AsyncLLM.from_parts(executor)
    await asyncio.gather(*(engine.shutdown() for _ in range(3)))
    assert not engine._thread.is_alive()


async def test_an_engine_that_fails_ends_every_stream_and_refuses_new_ones(engine, monkeypatch):
    def broken():
        raise ZeroDivisionError("in the middle of a step")

    streams = [asyncio.create_task(collect(engine.generate("the", LONG))) for _ in range(3)]
    await until(lambda: pages_used_now(engine) > 0)
    monkeypatch.setattr(engine._executor._engine, "step", broken)
    for stream in streams:
        with pytest.raises(EngineDeadError, match="ZeroDivisionError: in the middle of a step"):
            await asyncio.wait_for(stream, 5)
    with pytest.raises(EngineDeadError):
        await collect(engine.generate("the", GREEDY))


async def test_shutdown_ends_open_streams(model, tokenizer):
    executor = InProcessExecutor(lambda: build_engine(DeployConfig(model)))
    engine = AsyncLLM.from_parts(executor, tokenizer)
    stream = asyncio.create_task(collect(engine.generate("the", LONG)))
    await until(lambda: engine.open_requests == 1)
    await engine.shutdown()
    await engine.shutdown()
    with pytest.raises(EngineDeadError, match="shut down"):
        await asyncio.wait_for(stream, 5)
    with pytest.raises(EngineDeadError, match="shut down"):
        await collect(engine.generate("the", GREEDY))
