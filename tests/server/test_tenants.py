"""Over HTTP: clients that leave at random, few pages, and nobody reads what another was told."""

import asyncio
import json
import random

import httpx
import pytest
from running_server import RunningServer, demo_engine, eventually

CLIENTS = 120
AT_ONCE = 40
SHARED = "def add(a, b):\n    return a + b\n\n" * 3


@pytest.fixture(scope="module")
def crowded():
    """Float32, so that answers do not depend on who else is in a batch; pages for a few."""
    running = RunningServer(
        demo_engine(
            dtype="float32", max_num_seqs=12, num_pages=60, block_size=4, max_num_batched_tokens=96,
            max_model_len=128,
        )
    )  # fmt: skip
    yield running
    running.close()


def body_of(number):
    """A request whose answer tells whose it is."""
    source = random.Random(number)
    body = {
        "prompt": SHARED * source.randint(0, 1) + f"class Visitor{number}:\n    def __init__(",
        "max_tokens": source.randint(16, 40), "ignore_eos": True, "temperature": 0,
        "return_token_ids": True,
    }  # fmt: skip
    extras = [
        {}, {}, {"n": 2, "temperature": 1.0, "seed": number}, {"logprobs": 1},
        {"temperature": 1.0, "seed": number}, {"priority": source.randint(-1, 1)},
        {"cache_salt": f"tenant {number % 3}"},
        {
            "structured_outputs": {"choice": [f"visitor {number}", f"nobody {number}"]},
            "ignore_eos": False,
        },
    ]  # fmt: skip
    return {**body, **extras[number % len(extras)]}


async def whole(client, body):
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return [(c["token_ids"], c["finish_reason"]) for c in response.json()["choices"]]


async def streamed(client, body, leaves_after=None):
    """What came of a stream until its end, or until its reader left."""
    found = [([], None) for _ in range(body.get("n", 1))]
    events = 0
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event
            for choice in event["choices"]:
                tokens, _ = found[choice["index"]]
                tokens += choice["token_ids"]
                found[choice["index"]] = (tokens, choice["finish_reason"])
            events += 1
            if events == leaves_after:
                return found
    return found


async def visit(client, number, door):
    """What one client reads; None if it left without a word."""
    source = random.Random(-number)
    body, way = body_of(number), source.choice(["whole", "stream", "leaves", "gives up"])
    async with door:
        if way == "whole":
            return True, await whole(client, body)
        if way == "stream":
            return True, await streamed(client, body)
        if way == "leaves":
            return False, await streamed(client, body, source.randint(1, 6))
        try:
            async with asyncio.timeout(source.uniform(0.0, 1.0)):
                return True, await whole(client, body)
        except TimeoutError:
            return None


async def visit_all(url):
    limits = httpx.Limits(max_connections=AT_ONCE)
    door = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        return await asyncio.gather(*(visit(client, n, door) for n in range(CLIENTS)))


async def one_by_one(url, numbers):
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        return {n: await whole(client, body_of(n)) for n in numbers}


def test_nobody_reads_a_token_of_anothers_answer_whoever_leaves(crowded):
    visits = asyncio.run(visit_all(crowded.url))
    eventually(lambda: crowded.service.admission.open == 0)
    eventually(lambda: crowded.host.llm.open_requests == 0)
    eventually(lambda: crowded.pages_used() == 0)
    stats = crowded.host.llm.stats
    assert stats.aborted > CLIENTS / 10
    assert stats.preemptions > 0
    assert stats.prefix_hits > 0
    read = {n: found for n, found in enumerate(visits) if found is not None}
    alone = asyncio.run(one_by_one(crowded.url, read))
    assert sum(ended for ended, _ in read.values()) > CLIENTS / 3
    for number, (ended, choices) in read.items():
        for (tokens, reason), expected in zip(choices, alone[number], strict=True):
            if ended:
                assert (tokens, reason) == expected, body_of(number)
            else:
                assert tokens == expected[0][: len(tokens)], body_of(number)


@pytest.mark.parametrize(
    "salt", ["", " ", "x" * 10_000, "é", "e\u0301", "\0", "\U0001f389", "None"]
)
def test_a_salt_shares_with_itself_and_with_nobody_else(crowded, salt):
    def cached(**fields):
        body = {"prompt": f"{SHARED}# {salt[:3]!r}", "max_tokens": 1, **fields}
        usage = crowded.post("/v1/completions", **body).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    cached()
    assert cached() > 0
    assert cached(cache_salt=salt) == 0
    assert cached(cache_salt=salt) > 0
    assert cached(cache_salt=f"{salt}.") == 0


def test_a_salt_that_is_no_text_is_refused(crowded):
    for salt in (7, ["a"], {"a": 1}):
        answer = crowded.post("/v1/completions", prompt="a", cache_salt=salt)
        assert answer.status_code == 400, answer.text
    # Half of a surrogate pair is JSON, and no text.
    answer = crowded.client.post(
        "/v1/completions", content=b'{"prompt": "a", "cache_salt": "\\ud800"}',
        headers={"Content-Type": "application/json"},
    )  # fmt: skip
    assert answer.status_code == 400, answer.text
