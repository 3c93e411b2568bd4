"""The official openai package against a real server: what people write every day."""

import asyncio

import openai
import pytest

MESSAGES = [{"role": "user", "content": "Return the sum of two numbers."}]
GREEDY = {"model": "demo", "temperature": 0, "max_tokens": 10}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
async def async_client(server):
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0
    ) as made:
        yield made


def test_models_are_listed(client):
    (model,) = client.models.list().data
    assert model.id == "demo"
    assert client.models.retrieve("demo").id == "demo"


def test_completions_whole_and_streamed_are_the_same(client):
    whole = client.completions.create(prompt="import os", **GREEDY)
    stream = client.completions.create(prompt="import os", stream=True, **GREEDY)
    assert "".join(c.choices[0].text for c in stream) == whole.choices[0].text
    assert whole.usage.completion_tokens == 10


def test_chat_whole_and_streamed_are_the_same(client):
    whole = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    stream = client.chat.completions.create(
        messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    text, usage = "", None
    for chunk in stream:
        usage = chunk.usage or usage
        text += "".join(c.delta.content or "" for c in chunk.choices)
    assert text == whole.choices[0].message.content
    assert usage.total_tokens == whole.usage.total_tokens


def test_the_stream_helper_gathers_a_message(client):
    with client.chat.completions.stream(messages=MESSAGES, stop="(", **GREEDY) as stream:
        deltas = [e.delta for e in stream if e.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content


def test_logprobs_stop_n_and_seed(client):
    answer = client.chat.completions.create(
        messages=MESSAGES, model="demo", temperature=1, seed=1, n=2, max_tokens=6, logprobs=True,
        top_logprobs=2, stop=["zzz"],
    )  # fmt: skip
    again = client.chat.completions.create(
        messages=MESSAGES, model="demo", temperature=1, seed=1, n=2, max_tokens=6
    )
    assert [c.message.content for c in answer.choices] == [c.message.content for c in again.choices]
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    texts = client.completions.create(prompt="import", logprobs=3, **GREEDY).choices[0].logprobs
    assert len(texts.tokens) == len(texts.token_logprobs) == 10


def test_vllms_fields_go_through_extra_body(client):
    answer = client.completions.create(
        prompt="import", extra_body={"top_k": 1, "ignore_eos": True, "return_token_ids": True},
        model="demo", max_tokens=5,
    )  # fmt: skip
    assert len(answer.choices[0].token_ids) == 5


def test_errors_are_the_clients_own_classes(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="demo", prompt=[5] * 2000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.completions.create(model="demo", prompt="a", extra_body={"temprature": 1})
    assert unknown.value.param == "temprature"


def test_the_raw_response_has_the_request_id(client):
    raw = client.completions.with_raw_response.create(
        prompt="a", extra_headers={"X-Request-Id": "mine"}, **GREEDY
    )
    assert raw.headers["x-request-id"] == "mine"
    assert raw.parse()._request_id == "mine"


async def test_the_async_client_runs_many_at_once(async_client):
    async def one(number):
        stream = await async_client.chat.completions.create(
            messages=MESSAGES, stream=True, model="demo", temperature=1, seed=number, max_tokens=8
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    first = await asyncio.gather(*map(one, range(24)))
    second = await asyncio.gather(*map(one, range(24)))
    assert first == second
    whole = await async_client.completions.create(prompt=["a", "b"], **GREEDY)
    assert [c.index for c in whole.choices] == [0, 1]
