"""LangChain's ChatOpenAI against a server process."""

from typing import Literal

import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from served_process import KEY

# ChatOpenAI keeps its async connections for the next call.
on_one_loop = pytest.mark.asyncio(loop_scope="module")
QUESTION = "Return the sum of two numbers."


class Pet(BaseModel, extra="forbid"):
    """A pet."""

    kind: Literal["cat", "dog"]


@tool
def weather(city: Literal["Oslo", "Rome"]) -> str:
    """The weather of a city."""
    return f"Rain in {city}."


@pytest.fixture(scope="module")
def chat(served_demo):
    return ChatOpenAI(
        base_url=f"{served_demo.url}/v1", api_key=KEY, model="demo", temperature=0, max_tokens=60,
        max_retries=0,
    )  # fmt: skip


def test_an_answer_has_content_usage_and_a_reason(chat):
    answer = chat.invoke(QUESTION)
    usage = answer.usage_metadata
    assert answer.content
    assert usage["input_tokens"] + usage["output_tokens"] == usage["total_tokens"]
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert answer.response_metadata["model_name"] == "demo"


def test_messages_of_every_kind_are_taken(chat):
    answer = chat.invoke(
        [
            SystemMessage("Be brief."),
            HumanMessage("Hello."),
            AIMessage("Hello."),
            HumanMessage([{"type": "text", "text": QUESTION}]),
        ]
    )
    assert isinstance(answer, AIMessage)


def test_a_streamed_answer_is_the_whole_one_with_its_usage(chat):
    whole = chat.invoke(QUESTION)
    parts = list(chat.stream(QUESTION, stream_usage=True))
    merged = parts[0]
    for part in parts[1:]:
        merged += part
    assert merged.content == whole.content
    assert merged.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"]
    assert merged.response_metadata["finish_reason"] == whole.response_metadata["finish_reason"]


@on_one_loop
async def test_the_async_calls_answer_as_the_others_do(chat):
    whole = chat.invoke(QUESTION).content
    assert (await chat.ainvoke(QUESTION)).content == whole
    assert "".join([part.content async for part in chat.astream(QUESTION)]) == whole
    assert [answer.content for answer in await chat.abatch([QUESTION] * 3)] == [whole] * 3


def test_a_batch_is_answered_in_order(chat):
    questions = [QUESTION, "Open a file.", "Sort a list."]
    together = [answer.content for answer in chat.batch(questions)]
    assert together == [chat.invoke(question).content for question in questions]


def test_a_chain_runs_from_a_prompt_to_a_text(chat):
    prompt = ChatPromptTemplate.from_messages([("system", "Be brief."), ("human", "{question}")])
    chain = prompt | chat | StrOutputParser()
    text = chain.invoke({"question": QUESTION})
    assert text
    assert "".join(chain.stream({"question": QUESTION})) == text


def test_logprobs_seed_and_stop_are_passed_on(chat):
    bound = chat.bind(logprobs=True, top_logprobs=2, seed=1, stop=["zzz"], max_tokens=5)
    entries = bound.invoke(QUESTION).response_metadata["logprobs"]["content"]
    assert len(entries) == 5
    assert len(entries[0]["top_logprobs"]) == 2


def test_vllms_fields_go_through_extra_body(chat):
    fields = {"ignore_eos": True, "min_tokens": 20}
    answer = chat.bind(extra_body=fields, max_tokens=20).invoke(QUESTION)
    assert answer.usage_metadata["output_tokens"] == 20


@pytest.mark.parametrize("choice", ["required", "any", "weather"])
def test_a_bound_tool_is_called(chat, choice):
    bound = chat.bind_tools([weather], tool_choice=choice, strict=True, parallel_tool_calls=False)
    (call,) = bound.invoke(QUESTION).tool_calls
    assert call["name"] == "weather"
    assert weather.invoke(call["args"]).startswith("Rain in")


def test_a_tool_that_need_not_be_called_leaves_a_text(chat):
    answer = chat.bind_tools([weather]).invoke(QUESTION)
    assert answer.content
    assert not answer.tool_calls


def test_a_streamed_call_is_put_together(chat):
    bound = chat.bind_tools([weather], tool_choice="required", strict=True)
    parts = list(bound.stream(QUESTION))
    merged = parts[0]
    for part in parts[1:]:
        merged += part
    (call,) = merged.tool_calls
    assert call["args"]["city"] in ("Oslo", "Rome")


def test_the_result_of_a_tool_goes_back_to_the_model(chat):
    bound = chat.bind_tools([weather], tool_choice="required", strict=True)
    asked = bound.invoke(QUESTION)
    result = weather.invoke(asked.tool_calls[0])
    assert isinstance(result, ToolMessage)
    answer = chat.bind_tools([weather]).invoke([HumanMessage(QUESTION), asked, result])
    assert answer.content


@on_one_loop
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
async def test_structured_output_is_a_class(chat, method):
    asked = chat.with_structured_output(Pet, method=method)
    assert isinstance(asked.invoke(QUESTION), Pet)
    assert isinstance(await asked.ainvoke(QUESTION), Pet)
    assert isinstance(list(asked.stream(QUESTION))[-1], Pet)
    raw = chat.with_structured_output(Pet, method=method, include_raw=True).invoke(QUESTION)
    assert isinstance(raw["parsed"], Pet)
    assert raw["parsing_error"] is None


@on_one_loop
async def test_errors_are_those_of_the_openai_client(chat):
    with pytest.raises(openai.BadRequestError):
        chat.bind(n=0).invoke(QUESTION)
    with pytest.raises(ContextOverflowError):
        chat.invoke("word " * 3000)
    with pytest.raises(openai.NotFoundError):
        await chat.bind(model="other").ainvoke(QUESTION)
    stranger = ChatOpenAI(base_url=chat.openai_api_base, api_key="another", model="demo")
    with pytest.raises(openai.AuthenticationError):
        stranger.invoke(QUESTION)
