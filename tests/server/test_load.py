"""Many streams at once: none is lost, each is the right one, and no page stays behind."""

import asyncio
import json
import random

import httpx
import pytest
from running_server import RunningServer, demo_engine, eventually
from sustained_load import sustain

STREAMS = 200
TOKENS = 24


@pytest.fixture
def loaded():
    running = RunningServer(demo_engine(max_num_seqs=64))
    yield running
    running.close()


async def read(client, number, leaves):
    """The text of a stream; None if its reader left in the middle."""
    fields = {
        "prompt": f"def f{number}(", "max_tokens": TOKENS, "ignore_eos": True, "seed": number,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    text, usage, count = "", None, 0
    async with client.stream("POST", "/v1/completions", json=fields) as response:
        assert response.status_code == 200
        lines = response.aiter_lines()
        async for line in lines:
            if not line or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk
            usage = chunk["usage"] or usage
            text += "".join(c["text"] for c in chunk["choices"])
            count += 1
            if leaves and count == 3:
                return None
    assert usage["completion_tokens"] == TOKENS
    return text


async def read_all(running, leavers=frozenset()):
    limits = httpx.Limits(max_connections=STREAMS)
    async with httpx.AsyncClient(base_url=running.url, timeout=300, limits=limits) as client:
        numbers = range(STREAMS)
        texts = await asyncio.gather(*(read(client, n, n in leavers) for n in numbers))
    return dict(zip(numbers, texts, strict=True))


@pytest.mark.slow
def test_200_streams_at_once_end_and_a_third_that_leaves_changes_nothing(loaded):
    texts = asyncio.run(read_all(loaded))
    assert len(texts) == STREAMS
    eventually(lambda: loaded.pages_used() == 0)
    leavers = frozenset(random.Random(0).sample(range(STREAMS), STREAMS // 3))
    again = asyncio.run(read_all(loaded, leavers))
    assert all(again[n] is None for n in leavers)
    # Numbers of a batch's rows may be rounded otherwise in a batch of another size.
    same = [again[n] == texts[n] for n in texts if n not in leavers]
    assert sum(same) > 0.9 * len(same)
    eventually(lambda: loaded.service.admission.open == 0)
    eventually(lambda: loaded.host.llm.open_requests == 0)
    eventually(lambda: loaded.pages_used() == 0)


@pytest.mark.slow
@pytest.mark.parametrize("leavers", [0.0, 1 / 3])
def test_under_sustained_load_nothing_is_lost_memory_is_flat_and_no_page_stays(leavers):
    requests = 3000  # 10,000 take minutes: python tests/server/sustained_load.py
    outcome = sustain(requests, 500, leavers)
    assert outcome.lost == []
    assert outcome.answered + outcome.left == requests
    assert (outcome.left > requests / 5) == bool(leavers)
    assert outcome.front_growth < 50
    assert outcome.engine_growth < 50
    left = {**outcome.at_the_end, "aborted": 0}
    assert not any(left.values()), left
