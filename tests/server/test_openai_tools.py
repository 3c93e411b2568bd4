"""The official openai package's structured outputs and tools: classes in, objects out."""

import json
from enum import StrEnum
from typing import Literal

import openai
import pytest
from pydantic import BaseModel
from served_process import KEY


class Kind(StrEnum):
    CAT = "cat"
    DOG = "dog"


class Pet(BaseModel):
    kind: Kind
    legs: Literal[2, 4]


class Adopt(BaseModel):
    """Takes a pet home."""

    pet: Pet
    home: Literal["Oslo", "Rome"]


MESSAGES = [{"role": "user", "content": "a pet"}]
ASKED = {"model": "demo", "messages": MESSAGES, "temperature": 0, "max_tokens": 120}
ADOPT = openai.pydantic_function_tool(Adopt)


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


def test_an_answer_is_parsed_into_a_class(client):
    (choice,) = client.chat.completions.parse(response_format=Pet, **ASKED).choices
    assert isinstance(choice.message.parsed, Pet)
    assert Pet.model_validate_json(choice.message.content) == choice.message.parsed


async def test_an_answer_is_parsed_by_the_async_client(async_client):
    answer = await async_client.chat.completions.parse(response_format=Pet, **ASKED)
    assert isinstance(answer.choices[0].message.parsed, Pet)


def test_a_streamed_answer_is_parsed_into_a_class(client):
    with client.chat.completions.stream(response_format=Pet, **ASKED) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Pet)
    assert kinds.count("content.done") == 1


def test_an_answer_that_was_cut_off_says_so(client):
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(response_format=Pet, **{**ASKED, "max_tokens": 2})


def test_json_mode_and_a_schema_make_json(client):
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "yes", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(response_format=form, **ASKED)
    assert isinstance(json.loads(answer.choices[0].message.content)["yes"], bool)
    answer = client.chat.completions.create(response_format={"type": "json_object"}, **ASKED)
    assert answer.choices[0].message.content.lstrip().startswith("{")


def test_a_schema_that_cannot_be_compiled_is_a_bad_request(client):
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "wrong"}}}
    with pytest.raises(openai.BadRequestError, match="wrong"):
        client.chat.completions.create(response_format=form, **ASKED)


@pytest.mark.parametrize("choice", ["required", "named"])
def test_a_call_is_parsed_into_its_class(client, choice):
    named = {"type": "function", "function": {"name": "Adopt"}}
    (found,) = client.chat.completions.parse(
        tools=[ADOPT], tool_choice=named if choice == "named" else "required",
        parallel_tool_calls=False, **ASKED,
    ).choices  # fmt: skip
    (call,) = found.message.tool_calls
    assert isinstance(call.function.parsed_arguments, Adopt)
    assert call.id
    assert found.finish_reason == ("stop" if choice == "named" else "tool_calls")


def test_a_streamed_call_is_parsed_into_its_class(client):
    with client.chat.completions.stream(
        tools=[ADOPT], tool_choice="required", parallel_tool_calls=False, **ASKED
    ) as stream:
        pieces = [e for e in stream if e.type == "tool_calls.function.arguments.delta"]
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Adopt)
    assert "".join(piece.arguments_delta for piece in pieces) == call.function.arguments


def test_the_result_of_a_call_goes_back_to_the_model(client):
    (choice,) = client.chat.completions.create(
        tools=[ADOPT], tool_choice="required", parallel_tool_calls=False, **ASKED
    ).choices
    (call,) = choice.message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"done": true}'}
    answer = client.chat.completions.create(
        **{**ASKED, "messages": [*MESSAGES, choice.message, result]}, tools=[ADOPT]
    )
    assert answer.choices[0].message.content
    assert answer.usage.prompt_tokens > 40


def test_a_model_that_may_call_may_also_answer(client):
    for choice in ("auto", "none"):
        answer = client.chat.completions.create(tools=[ADOPT], tool_choice=choice, **ASKED)
        assert answer.choices[0].message.content
        assert answer.choices[0].message.tool_calls is None
