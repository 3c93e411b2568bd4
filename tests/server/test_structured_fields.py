"""vLLM's fields for the form of an output: structured_outputs, and the older guided ones."""

import json
import re

import pytest

SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "maximum": 20}},
    "required": ["age"],
    "additionalProperties": False,
}
GRAMMAR = 'root ::= "x = " [0-9] [0-9]'
CHAT = {"messages": [{"role": "user", "content": "a"}]}
PATHS = {"/v1/chat/completions": CHAT, "/v1/completions": {"prompt": "a"}}
FORMS = {
    "json": (SCHEMA, lambda text: set(json.loads(text)) == {"age"}),
    "regex": ("[ab]{3}c", lambda text: re.fullmatch("[ab]{3}c", text)),
    "choice": (["cat", "dog"], lambda text: text in ("cat", "dog")),
    "grammar": (GRAMMAR, lambda text: re.fullmatch("x = [0-9]{2}", text)),
}


def text_of(answer):
    (choice,) = answer.json()["choices"]
    return choice["message"]["content"] if "message" in choice else choice["text"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("guided", [False, True])
def test_the_output_has_the_form_that_was_asked_for(server, path, kind, guided):
    value, holds = FORMS[kind]
    fields = {f"guided_{kind}": value} if guided else {"structured_outputs": {kind: value}}
    answer = server.post(path, **PATHS[path], **fields, max_tokens=60, temperature=0)
    assert holds(text_of(answer)), answer.text


def test_a_schema_may_be_text(server):
    answer = server.post(
        "/v1/completions", prompt="a", guided_json=json.dumps(SCHEMA), max_tokens=60, temperature=0
    )
    assert json.loads(text_of(answer))["age"] <= 20


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "regex"),
        ({"guided_regex": "("}, "guided_regex", "guided_regex cannot be compiled"),
        ({"guided_grammar": "root ::= missing"}, "guided_grammar", "neither Lark nor GBNF"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", "'regex'"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "choice"),
        ({"structured_outputs": {"regex": "a" * 20000}}, "structured_outputs", "at most 16384"),
        ({"guided_json": "{"}, "guided_json", "no JSON"),
        ({"guided_json": {"type": 3}}, "guided_json", "guided_json cannot be compiled"),
        ({"guided_choice": [""]}, "guided_choice", "not empty"),
        ({"guided_choice": "cat"}, "guided_choice", "list"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "one of them"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "one"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}},
         "response_format", "response_format cannot be compiled"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}},
         "response_format.json_schema", "object"),
    ],
)  # fmt: skip
def test_a_form_that_cannot_be_had_is_a_400_with_the_reason(server, path, fields, param, word):
    answer = server.post(path, **PATHS[path], **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert word in error["message"]


@pytest.mark.parametrize("prompts", ["a", ["a", "b"]])
@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_and_streams_blame_the_same_field(server, prompts, stream):
    answer = server.post("/v1/completions", prompt=prompts, guided_regex="(", stream=stream)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "guided_regex")


def test_the_schema_of_a_call_that_is_demanded_is_the_tools_fault(server):
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    answer = server.post("/v1/chat/completions", **CHAT, tools=[tool], tool_choice="required")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")


def test_a_call_and_a_form_are_not_demanded_together(server):
    tool = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
    answer = server.post(
        "/v1/chat/completions", **CHAT, tools=[tool], tool_choice="required", guided_regex="a"
    )
    assert answer.json()["error"]["param"] == "guided_regex"
