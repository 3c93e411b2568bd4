"""The official openai package against a server process: what people write every day."""

import asyncio

import openai
import pytest
from served_process import KEY

MESSAGES = [{"role": "user", "content": "Return the sum of two numbers."}]
GREEDY = {"model": "demo", "temperature": 0, "max_tokens": 10}
LONG = {"model": "demo", "max_tokens": 900, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def client(served_demo):
    with openai.OpenAI(base_url=f"{served_demo.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture
async def async_client(served_demo):
    async with openai.AsyncOpenAI(
        base_url=f"{served_demo.url}/v1", api_key=KEY, max_retries=0
    ) as made:
        yield made


def test_models_are_listed(client):
    (model,) = client.models.list().data
    assert model.id == "demo"
    assert [each.id for each in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"


def test_completions_whole_and_streamed_are_the_same(client):
    whole = client.completions.create(prompt="import os", **GREEDY)
    stream = client.completions.create(prompt="import os", stream=True, **GREEDY)
    assert "".join(c.choices[0].text for c in stream) == whole.choices[0].text
    assert whole.usage.completion_tokens == 10
    assert whole.choices[0].finish_reason == "length"


def test_prompts_come_as_texts_as_token_ids_and_as_lists_of_either(client):
    ids = [5, 6, 7]
    alone = client.completions.create(prompt=ids, **GREEDY).choices[0].text
    both = client.completions.create(prompt=[ids, [8, 9]], **GREEDY)
    assert [c.index for c in both.choices] == [0, 1]
    assert both.choices[0].text == alone
    assert both.usage.prompt_tokens == 5


def test_an_echo_has_logprobs_of_the_prompt(client):
    (choice,) = client.completions.create(
        model="demo", prompt="import os", echo=True, logprobs=1, max_tokens=0
    ).choices
    assert choice.text == "import os"
    first, *others = choice.logprobs.token_logprobs
    assert first is None
    assert all(value <= 0 for value in others)
    assert "".join(choice.logprobs.tokens[-len(others) :]) in choice.text


def test_chat_whole_and_streamed_are_the_same(client):
    whole = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    stream = client.chat.completions.create(
        messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    text, usages = "", []
    for chunk in stream:
        usages.append(chunk.usage)
        text += "".join(c.delta.content or "" for c in chunk.choices)
    assert text == whole.choices[0].message.content
    assert usages[-1].total_tokens == whole.usage.total_tokens
    assert not any(usages[:-1])


def test_messages_of_every_role_and_of_parts_are_taken(client):
    parts = [{"type": "text", "text": "Say so."}, {"type": "text", "text": "Again."}]
    answer = client.chat.completions.create(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
            {"role": "user", "content": "Hello.", "name": "Ada"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": parts},
        ],
        **GREEDY,
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content


def test_logprobs_stop_n_and_seed(client):
    answer = client.chat.completions.create(
        messages=MESSAGES, model="demo", temperature=1, seed=1, n=2, max_tokens=6, logprobs=True,
        top_logprobs=2, stop=["zzz"],
    )  # fmt: skip
    again = client.chat.completions.create(
        messages=MESSAGES, model="demo", temperature=1, seed=1, n=2, max_tokens=6
    )
    assert [c.message.content for c in answer.choices] == [c.message.content for c in again.choices]
    entry = answer.choices[0].logprobs.content[0]
    assert len(entry.top_logprobs) == 2
    assert bytes(entry.bytes).decode() == entry.token
    texts = client.completions.create(prompt="import", logprobs=3, **GREEDY).choices[0].logprobs
    assert len(texts.tokens) == len(texts.token_logprobs) == 10


def test_a_stop_string_ends_the_text_before_it(client):
    whole = client.completions.create(prompt="import os", **GREEDY).choices[0].text
    cut = client.completions.create(prompt="import os", stop=whole[5:8], **GREEDY).choices[0]
    assert cut.text == whole[: whole.index(whole[5:8])]
    assert cut.finish_reason == "stop"


def test_a_biased_token_is_the_answer(client):
    answer = client.chat.completions.create(
        messages=MESSAGES, logit_bias={"7": 100}, model="demo", max_tokens=3,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    assert answer.choices[0].token_ids == [7, 7, 7]


def test_vllms_fields_go_through_extra_body(client):
    answer = client.completions.create(
        prompt="import", extra_body={"top_k": 1, "ignore_eos": True, "return_token_ids": True},
        model="demo", max_tokens=5,
    )  # fmt: skip
    assert len(answer.choices[0].token_ids) == 5


def test_the_stream_helper_gathers_a_message(client):
    with client.chat.completions.stream(messages=MESSAGES, stop="(", **GREEDY) as stream:
        deltas = [e.delta for e in stream if e.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content
    assert final.choices[0].finish_reason in ("stop", "length")


def test_the_raw_response_has_the_request_id(client):
    raw = client.completions.with_raw_response.create(
        prompt="a", extra_headers={"X-Request-Id": "mine"}, **GREEDY
    )
    assert raw.headers["x-request-id"] == "mine"
    assert raw.parse()._request_id == "mine"
    streaming = client.completions.with_streaming_response.create(prompt="a", **GREEDY)
    with streaming as response:
        assert response.status_code == 200
        assert response.parse().choices[0].finish_reason == "length"


def test_a_wrong_request_raises_what_it_did_wrong(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="demo", prompt=[5] * 2000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.completions.create(model="demo", prompt="a", extra_body={"temprature": 1})
    assert unknown.value.param == "temprature"
    with pytest.raises(openai.BadRequestError) as streamed:
        client.chat.completions.create(model="demo", messages=[], stream=True)
    assert (streamed.value.type, streamed.value.param) == ("invalid_request_error", "messages")


def test_a_wrong_key_is_an_authentication_error(client):
    with pytest.raises(openai.AuthenticationError) as refused:
        client.with_options(api_key="another").models.list()
    assert refused.value.code == "invalid_api_key"


def test_a_full_server_is_a_rate_limit_error_and_retried_when_told(client, served_demo):
    with served_demo.stream(n=48) as stream:
        lines = stream.iter_lines()  # dropped, it would close the response
        next(lines)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(prompt="a", **GREEDY)
        assert refused.value.code == "rate_limit_exceeded"
        assert refused.value.response.headers["retry-after"] == "1"
    # The first try may come before the places are free again.
    patient = client.with_options(max_retries=3)
    assert patient.completions.create(prompt="a", **GREEDY).choices


def test_who_does_not_wait_gets_a_timeout(client):
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).completions.create(prompt="a", n=8, **LONG)


def test_a_stream_is_left_in_the_middle(client):
    stream = client.completions.create(prompt="a", stream=True, **LONG)
    for chunk in stream:
        assert chunk.choices
        break
    stream.close()
    with client.completions.create(prompt="a", stream=True, **LONG) as left:
        next(iter(left))


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


async def test_the_async_client_has_models_helpers_and_errors(async_client):
    assert [model.id async for model in async_client.models.list()] == ["demo"]
    helper = async_client.chat.completions.stream(messages=MESSAGES, stop="(", **GREEDY)
    async with helper as stream:
        deltas = [e.delta async for e in stream if e.type == "content.delta"]
        final = await stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content
    raw = await async_client.completions.with_raw_response.create(prompt="a", **GREEDY)
    assert raw.parse().choices
    with pytest.raises(openai.BadRequestError):
        await async_client.completions.create(model="demo", prompt="a", n=0)
    with pytest.raises(openai.AuthenticationError):
        await async_client.with_options(api_key="another").models.list()
    with pytest.raises(openai.APITimeoutError):
        await async_client.with_options(timeout=0.2).completions.create(prompt="a", n=8, **LONG)


async def test_a_cancelled_call_is_aborted(async_client, served_demo):
    call = asyncio.create_task(async_client.completions.create(prompt="a", n=48, **LONG))
    await asyncio.sleep(0.3)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    answer = await async_client.with_options(max_retries=3).completions.create(
        model="demo", prompt="a", n=48, max_tokens=2
    )
    assert len(answer.choices) == 48
