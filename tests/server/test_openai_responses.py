"""The official openai package's `responses` against a real server, sync and async."""

import asyncio
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

GREEDY = {"model": "demo", "temperature": 0, "max_output_tokens": 10}


class Pet(BaseModel):
    kind: Literal["cat", "dog"]
    old: bool


SCHEMA = {**Pet.model_json_schema(), "additionalProperties": False}
TOOLS = [{"type": "function", "name": "adopt", "parameters": SCHEMA, "strict": True}]
DEMANDED = {
    "input": "a pet", "tools": TOOLS, "model": "demo", "temperature": 0, "max_output_tokens": 80,
    "tool_choice": {"type": "function", "name": "adopt"},
}  # fmt: skip


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


def test_create_whole_and_streamed_are_the_same(client):
    whole = client.responses.create(input="import os", **GREEDY)
    events = list(client.responses.create(input="import os", stream=True, **GREEDY))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    assert events[-1].type == "response.incomplete"
    assert whole.usage.output_tokens == 10
    assert whole.incomplete_details.reason == "max_output_tokens"


def test_the_stream_helper_gathers_a_response(client):
    with client.responses.stream(
        input="a pet", text_format=Pet, model="demo", temperature=0
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[-1] == "response.completed"
    assert final.output_parsed.kind in ("cat", "dog")


def test_parse_gives_an_object(client):
    parsed = client.responses.parse(input="a pet", text_format=Pet, model="demo", temperature=0)
    assert isinstance(parsed.output_parsed, Pet)


def test_calls_and_their_outputs_go_round(client):
    first = client.responses.create(**DEMANDED)
    (call,) = first.output
    assert call.type == "function_call"
    Pet.model_validate_json(call.arguments)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    by_name = client.responses.create(input=[output], previous_response_id=first.id, **GREEDY)
    spelled = client.responses.create(
        input=[{"role": "user", "content": "a pet"}, *first.output, output], **GREEDY
    )
    assert by_name.output_text == spelled.output_text


def test_the_stream_helper_gathers_calls(client):
    with client.responses.stream(**DEMANDED) as stream:
        deltas = [e.delta for e in stream if e.type == "response.function_call_arguments.delta"]
        (call,) = stream.get_final_response().output
    assert "".join(deltas) == call.arguments
    Pet.model_validate_json(call.arguments)


def test_responses_are_retrieved_and_deleted(client):
    made = client.responses.create(input="a", metadata={"k": "v"}, **GREEDY)
    assert client.responses.retrieve(made.id).output_text == made.output_text
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_errors_are_the_packages_own(client):
    image = [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]
    with pytest.raises(openai.BadRequestError) as wrong:
        client.responses.create(input=image, model="demo")
    assert wrong.value.param == "input[0].content[0].type"
    with pytest.raises(openai.NotFoundError):
        client.responses.create(input="a", model="other", stream=True)


async def test_the_async_client_streams_and_parses(async_client):
    async def one(number):
        stream = await async_client.responses.create(
            input="a", stream=True, model="demo", max_output_tokens=8, extra_body={"seed": number}
        )
        return "".join([e.delta async for e in stream if e.type == "response.output_text.delta"])

    assert await asyncio.gather(*map(one, range(8))) == await asyncio.gather(*map(one, range(8)))
    parsed = await async_client.responses.parse(
        input="a pet", text_format=Pet, model="demo", temperature=0
    )
    assert isinstance(parsed.output_parsed, Pet)
    async with async_client.responses.stream(input="a", **GREEDY) as stream:
        kinds = [event.type async for event in stream]
    assert kinds[0] == "response.created"
