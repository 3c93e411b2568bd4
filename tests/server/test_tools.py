"""Calls of tools and reasoning in chat messages."""

import json

import pytest

from autodeploy.server.chat_message import MessageReader
from autodeploy.server.parsing import AnswerParser, reasoning_format, tool_format

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": CITY}}
    for name in ("weather", "population")
]
ASKED = {
    "messages": [{"role": "user", "content": "How is it in Rome?"}],
    "tools": TOOLS, "max_tokens": 80, "temperature": 0, "parallel_tool_calls": False,
}  # fmt: skip
PATH = "/v1/chat/completions"
TEXT = (
    '<think>Rome.</think>Let me see.<tool_call>{"name": "weather", '
    '"arguments": {"city": "Rome"}}</tool_call>'
)


@pytest.fixture
def parser():
    return AnswerParser(tool_format("hermes"), reasoning_format("deepseek_r1"))


def streamed(server, **fields):
    """The messages of a stream, put together, and its last reason."""
    calls, reason = {}, None
    with server.client.stream("POST", PATH, json={**ASKED, **fields, "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: {")]
    for line in lines:
        (choice,) = json.loads(line[6:])["choices"]
        for piece in choice["delta"].get("tool_calls", []):
            call = calls.setdefault(piece["index"], {"name": "", "arguments": ""})
            for name, text in piece["function"].items():
                call[name] += text
        reason = choice["finish_reason"] or reason
    return list(calls.values()), reason


def test_a_demanded_call_is_made(server):
    (choice,) = server.post(PATH, **ASKED, tool_choice="required").json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] in ("weather", "population")
    assert json.loads(call["function"]["arguments"])["city"] in ("Oslo", "Rome")
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "tool_calls"


def test_a_named_tool_is_called(server):
    named = {"type": "function", "function": {"name": "population"}}
    (choice,) = server.post(PATH, **ASKED, tool_choice=named).json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "population"
    assert choice["finish_reason"] == "stop"


def test_a_streamed_call_is_the_whole_one(server):
    (choice,) = server.post(PATH, **ASKED, tool_choice="required").json()["choices"]
    whole = choice["message"]["tool_calls"][0]["function"]
    ((call,), reason) = streamed(server, tool_choice="required")
    assert call["name"] == whole["name"]
    assert json.loads(call["arguments"]) == json.loads(whole["arguments"])
    assert reason == "tool_calls"


def test_tools_are_refused_where_calls_could_not_be_told_from_text(server):
    answer = server.post(PATH, **ASKED)
    assert answer.status_code == 400
    assert "--tool-call-parser" in answer.json()["error"]["message"]


def test_a_call_and_another_form_are_not_demanded_together(server):
    form = {"type": "json_object"}
    answer = server.post(PATH, **ASKED, tool_choice="required", response_format=form)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "response_format"


def test_a_message_is_read_whole(parser):
    reader = MessageReader(parser, "")
    message = reader.whole(TEXT)
    assert message.content == "Let me see."
    assert message.reasoning_content == "Rome."
    assert json.loads(message.tool_calls[0]["function"]["arguments"]) == {"city": "Rome"}
    assert reader.finish_reason("stop") == "tool_calls"
    assert reader.finish_reason("length") == "length"


def test_a_message_is_read_as_it_comes(parser):
    reader, content, reasoning, arguments = MessageReader(parser, ""), "", "", ""
    for at, letter in enumerate(TEXT):
        piece = reader.add(letter, at == len(TEXT) - 1)
        if piece is not None:
            content += piece.content or ""
            reasoning += piece.reasoning_content or ""
            arguments += "".join(c["function"]["arguments"] for c in piece.tool_calls or [])
    assert (content, reasoning) == ("Let me see.", "Rome.")
    assert json.loads(arguments) == {"city": "Rome"}
    assert reader.finish_reason("stop") == "tool_calls"
