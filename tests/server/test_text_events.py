"""Events that differ in their text only are the bytes that serialising each would give."""

import json

import pytest

from autodeploy.server.answers import TextEvents, event
from autodeploy.server.protocol.chat import ChatChunk, ChatChunkChoice, Message
from autodeploy.server.protocol.completions import Completion, CompletionChoice


def completion(text):
    choice = CompletionChoice(index=2, text=text, logprobs=None, finish_reason=None)
    return Completion(id="c", object="text_completion", created=1, model="m", choices=[choice])


def chat(text):
    choice = ChatChunkChoice(
        index=0, delta=Message(content=text), logprobs=None, finish_reason=None
    )
    return ChatChunk(id="c", object="chat.completion.chunk", created=1, model="m", choices=[choice])


@pytest.mark.parametrize("made", [completion, chat])
@pytest.mark.parametrize("text", ["a", "", ' "quoted"\n\t\\', "é 漢 🙂", "\x00\x1f\x7f", "\u2028"])
def test_an_event_says_what_the_whole_chunk_would(made, text):
    written = TextEvents(made(TextEvents.TEXT)).event(text)
    assert written.count(b"\n") == 2
    assert written.endswith(b"\n\n")
    expected = event(made(text))
    assert json.loads(written[6:]) == json.loads(expected[6:])


def test_a_streams_events_all_have_the_same_fields(server):
    for path, prompt in (
        ("/v1/completions", {"prompt": "def f("}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "def f("}]}),
    ):
        body = {**prompt, "max_tokens": 12, "ignore_eos": True, "stream": True, "n": 2}
        with server.client.stream("POST", path, json=body) as response:
            lines = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
        events = [json.loads(line) for line in lines]
        assert {frozenset(e) for e in events} == {
            frozenset({"id", "object", "created", "model", "choices"})
        }
        assert len({e["id"] for e in events}) == 1
        assert {e["choices"][0]["index"] for e in events} == {0, 1}
        assert sum(e["choices"][0]["finish_reason"] == "length" for e in events) == 2
