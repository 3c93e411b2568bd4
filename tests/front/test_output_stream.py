"""OutputStream: outputs cross to the event loop, and join for a reader that lags."""

import asyncio
import threading

import pytest

from autodeploy.errors import EngineError
from autodeploy.output_stream import OutputStream, hand_out, joined
from autodeploy.outputs import CompletionOutput, Logprob, RequestOutput


def delta(*parts, finished=False):
    return RequestOutput("r", None, [1], list(parts), finished)


def part(index, text, tokens, reason=None, logprobs=None):
    return CompletionOutput(index, text, tokens, -1.0, logprobs, reason)


def test_joined_deltas_say_what_they_said_one_by_one():
    entry = {7: Logprob(-0.5)}
    first = delta(part(1, "x", [7], logprobs=[entry]))
    second = delta(part(0, "a", [5]), part(1, "y", [8], logprobs=[entry]))
    last = delta(part(1, "", [], "stop"), finished=True)
    whole = joined([first, second, last])
    assert whole.finished
    assert [(p.index, p.text, p.token_ids) for p in whole.outputs] == [
        (0, "a", [5]), (1, "xy", [7, 8]),
    ]  # fmt: skip
    assert whole.outputs[1].logprobs == [entry, entry]
    assert [p.finish_reason for p in whole.outputs] == [None, "stop"]


async def test_a_reader_that_lags_gets_everything_at_once_and_then_the_error():
    stream = OutputStream(None, "delta")
    error = EngineError("gone")

    def write():
        hand_out([(stream, delta(part(0, letter, [1]))) for letter in "abc"])
        hand_out([(stream, error)])

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    await asyncio.sleep(0)
    assert (await stream.next()).outputs[0].text == "abc"
    with pytest.raises(EngineError, match="gone"):
        await stream.next()


async def test_of_several_snapshots_the_last_one_counts():
    stream = OutputStream(None, "cumulative")
    for text in ("a", "ab"):
        stream.take(delta(part(0, text, [1])))
    assert (await stream.next()).outputs[0].text == "ab"


async def test_a_reader_that_was_cancelled_does_not_keep_the_next_from_reading():
    stream = OutputStream(None, "delta")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(stream.next(), 0.01)
    stream.take(delta(part(0, "a", [1])))
    assert (await stream.next()).outputs[0].text == "a"


def test_outputs_for_a_loop_that_is_closed_go_nowhere():
    async def make():
        return OutputStream(None, "delta")

    stream = asyncio.run(make())
    hand_out([(stream, delta(part(0, "a", [1])))])
