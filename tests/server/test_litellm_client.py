"""LiteLLM against a server process, as `openai/` and as `hosted_vllm/`."""

import asyncio
import json
from typing import Literal

import litellm
import pytest
from pydantic import BaseModel
from served_process import KEY

MESSAGES = [{"role": "user", "content": "Return the sum of two numbers."}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]


class Pet(BaseModel, extra="forbid"):
    kind: Literal["cat", "dog"]


# LiteLLM keeps its async connections for the next call.
on_one_loop = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module", params=["openai", "hosted_vllm"])
def asked(request, served_demo):
    """Arguments of every call."""
    return {
        "model": f"{request.param}/demo", "api_base": f"{served_demo.url}/v1", "api_key": KEY,
        "temperature": 0, "max_tokens": 60, "num_retries": 0, "max_retries": 0,
    }  # fmt: skip


def content(chunks):
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def test_a_completion_whole_and_streamed_are_the_same(asked):
    whole = litellm.completion(messages=MESSAGES, **asked)
    chunks = list(
        litellm.completion(
            messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **asked
        )
    )
    assert content(chunks) == whole.choices[0].message.content
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    built = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    assert built.choices[0].message.content == whole.choices[0].message.content


@on_one_loop
async def test_an_async_completion_whole_and_streamed_are_the_same(asked):
    async def streamed():
        answer = await litellm.acompletion(messages=MESSAGES, stream=True, **asked)
        return content([chunk async for chunk in answer])

    whole = await litellm.acompletion(messages=MESSAGES, **asked)
    texts = await asyncio.gather(*(streamed() for _ in range(8)))
    assert set(texts) == {whole.choices[0].message.content}


def test_several_conversations_go_in_one_call(asked):
    answers = litellm.batch_completion(messages=[MESSAGES, MESSAGES], **asked)
    first, second = (answer.choices[0].message.content for answer in answers)
    assert first == second


def test_usage_has_a_model_without_a_price(asked):
    answer = litellm.completion(messages=MESSAGES, **asked)
    usage = answer.usage
    assert usage.prompt_tokens + usage.completion_tokens == usage.total_tokens
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert not answer._hidden_params.get("response_cost")


def test_sampling_fields_are_passed_on(asked):
    fields = {**asked, "temperature": 1, "max_tokens": 6}
    first, again = (
        litellm.completion(
            messages=MESSAGES, n=2, seed=1, top_p=0.9, presence_penalty=0.5, frequency_penalty=0.5,
            stop=["zzz"], user="ada", logprobs=True, top_logprobs=2, **fields,
        )
        for _ in range(2)
    )  # fmt: skip
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(texts) == 2
    assert len(first.choices[0].logprobs.content[0].top_logprobs) == 2


def test_vllms_fields_go_through_extra_body(asked):
    answer = litellm.completion(
        messages=MESSAGES, extra_body={"ignore_eos": True, "min_tokens": 60, "top_k": 1}, **asked
    )
    assert answer.usage.completion_tokens == 60


def test_a_response_format_is_kept_to(asked):
    for form in (Pet, {"type": "json_schema", "json_schema": {"name": "p", "strict": True,
                       "schema": Pet.model_json_schema()}}):  # fmt: skip
        answer = litellm.completion(messages=MESSAGES, response_format=form, **asked)
        assert Pet.model_validate_json(answer.choices[0].message.content)


def test_tools_are_called_and_their_results_come_back(asked):
    answer = litellm.completion(
        messages=MESSAGES, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, **asked
    )
    message = answer.choices[0].message
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    result = {"role": "tool", "tool_call_id": call.id, "name": "weather", "content": "Rain."}
    after = litellm.completion(messages=[*MESSAGES, message, result], tools=TOOLS, **asked)
    assert after.choices[0].message.content


def test_streamed_calls_are_put_together(asked):
    chunks = list(
        litellm.completion(
            messages=MESSAGES, tools=TOOLS, tool_choice="required", parallel_tool_calls=False,
            stream=True, **asked,
        )
    )  # fmt: skip
    (call,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")


def test_errors_are_litellms_own(asked):
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(messages=[], **{**asked, "max_tokens": 2})
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=[{"role": "user", "content": "word " * 3000}], **asked)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(messages=MESSAGES, **{**asked, "api_key": "another"})
    other = asked["model"].replace("demo", "other")
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=MESSAGES, **{**asked, "model": other})


@on_one_loop
async def test_async_errors_are_litellms_own(asked):
    with pytest.raises(litellm.AuthenticationError):
        await litellm.acompletion(messages=MESSAGES, **{**asked, "api_key": "another"})
    with pytest.raises(litellm.Timeout):
        await litellm.acompletion(
            messages=MESSAGES, timeout=0.2, n=8, extra_body={"ignore_eos": True},
            **{**asked, "max_tokens": 900, "temperature": 1},
        )  # fmt: skip


@on_one_loop
@pytest.mark.parametrize("provider", ["text-completion-openai", "hosted_vllm"])
async def test_texts_are_completed(served_demo, provider):
    asked = {
        "model": f"{provider}/demo", "api_base": f"{served_demo.url}/v1", "api_key": KEY,
        "prompt": "import os", "temperature": 0, "max_tokens": 8,
    }  # fmt: skip
    whole = litellm.text_completion(**asked).choices[0].text
    assert whole
    streamed = litellm.text_completion(stream=True, **asked)
    assert "".join(chunk.choices[0].text or "" for chunk in streamed if chunk.choices) == whole
    assert (await litellm.atext_completion(**asked)).choices[0].text == whole
