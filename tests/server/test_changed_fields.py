"""Good requests with some fields changed: each is served, or refused with its reason.

What a schema makes at random is mostly refused at once; this gets behind the first checks.
Long form: `pytest -m slow tests/server/test_changed_fields.py`.
"""

import json

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from running_server import RunningServer, demo_engine, eventually

from autodeploy.server.protocol.chat import ChatRequest
from autodeploy.server.protocol.completions import CompletionRequest
from autodeploy.server.protocol.embeddings import EmbeddingRequest
from autodeploy.server.protocol.responses import ResponseRequest
from autodeploy.server.protocol.tokens import DetokenizeRequest, TokenizeRequest

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
ENDPOINTS = {
    "/v1/chat/completions": (
        ChatRequest, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
    ),
    "/v1/completions": (CompletionRequest, {"prompt": "a", "max_tokens": 3}),
    "/v1/responses": (ResponseRequest, {"input": "a", "max_output_tokens": 3}),
    "/tokenize": (TokenizeRequest, {"prompt": "a"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [5, 6]}),
}  # fmt: skip
EMBEDDINGS = {"/v1/embeddings": (EmbeddingRequest, {"input": "a"})}
# What fields are made of: right values of some, and edges of all.
WORDS = [
    "", "a", "demo", "required", "auto", "none", "text", "json_object", "json_schema", "function",
    "regex", "type", "schema", "name", "role", "user", "assistant", "tool", "content", "\ud800",
    "\0", "1", "-1", "é" * 9, "x" * 3000, "{{ 1 }}", "$ref", "#",
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 3, 5, 63, 64, 4095, 4096, 2**31, 2**63, 2**64, -(2**63), 10**30,
    0.0, 0.5, 1.0, 1e-300, -0.5, 1e308, -1e308,
]  # fmt: skip
GOOD = [
    [TOOL], SCHEMA, {"type": "json_object"}, {"type": "text"}, {"5": 1.5}, {"include_usage": True},
    {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
    {"type": "function", "function": {"name": "f"}}, {"type": "function", "name": "f"},
    {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}}, {"effort": "low"},
    {"choice": ["cat", "dog"]}, {"regex": "[ab]+"}, ["message.output_text.logprobs"],
    [{"type": "function", "name": "f", "parameters": SCHEMA}],
    [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
     {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
     {"type": "function_call_output", "call_id": "c", "output": "b"}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    [{"role": "assistant", "content": None, "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
     {"role": "tool", "tool_call_id": "c", "content": "b"}],
]  # fmt: skip
LEAF = st.one_of(st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(WORDS))
VALUE = st.one_of(
    LEAF,
    st.sampled_from(GOOD),
    st.recursive(
        LEAF,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4)
        ),
        max_leaves=8,
    ),
)


@pytest.fixture(scope="module")
def small():
    """A server whose longest answer takes a moment."""
    running = RunningServer(
        demo_engine(max_model_len=64), max_n=3, max_prompts=4, max_logprobs=5,
        tool_call_parser="hermes", reasoning_parser="deepseek_r1",
    )  # fmt: skip
    yield running
    running.close()


def check(running, path, body):
    response = running.client.post(
        path, content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["message"]
    elif response.headers["content-type"].startswith("text/event-stream"):
        check_events([each for each in response.text.split("\n\n") if each])
    else:
        assert not response.json().get("error")


def check_events(events):
    data = [event.splitlines()[-1].removeprefix("data: ") for event in events]
    if events[0].startswith("event: "):
        last = json.loads(data[-1])
        assert last["type"] in ("response.completed", "response.incomplete"), last
    else:
        assert data.pop() == "[DONE]"
        assert not any("error" in json.loads(each) for each in data), events


def change_fields(running, path, examples, *, deterministic):
    model, good = {**ENDPOINTS, **EMBEDDINGS}[path]
    changes = st.dictionaries(st.sampled_from(sorted(model.model_fields)), VALUE, max_size=3)

    @settings(
        max_examples=examples, deadline=None, derandomize=deterministic, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(changes=changes, stream=st.booleans())
    def ask(changes, stream):
        body = {**good, **changes}
        if stream and "stream" in model.model_fields:
            body["stream"] = True
        check(running, path, body)

    ask()
    eventually(lambda: running.host.llm.open_requests == 0)
    eventually(lambda: running.pages_used() == 0)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_request_with_fields_changed_is_served_or_refused(small, path):
    change_fields(small, path, 120, deterministic=True)


def test_a_request_for_embeddings_with_fields_changed_is_served_or_refused():
    running = RunningServer(demo_engine(max_model_len=64, task="embed"), max_prompts=4)
    try:
        change_fields(running, "/v1/embeddings", 120, deterministic=True)
    finally:
        running.close()


@pytest.mark.slow
@pytest.mark.parametrize("path", ENDPOINTS)
def test_of_thousands_of_changed_requests_none_breaks_the_server(small, path):
    change_fields(small, path, 3000, deterministic=False)
