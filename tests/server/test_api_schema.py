"""/openapi.json: what requests may be, what may refuse them, and that answers stream."""

import jsonschema
import pytest
from running_server import DEMO

from autodeploy.server.admission import Admission
from autodeploy.server.api_schema import REFUSALS
from autodeploy.server.app import build_app
from autodeploy.server.config import ServerConfig
from autodeploy.server.errors import ANSWERS, ApiError

GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


@pytest.fixture(scope="module")
def schema(server):
    return server.client.get("/openapi.json").json()


def operations(schema):
    return [
        (path, method, operation)
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    ]


def test_no_operation_has_fastapis_own_refusal(schema):
    assert not any("422" in operation["responses"] for _, _, operation in operations(schema))
    assert "HTTPValidationError" not in schema["components"]["schemas"]


@pytest.mark.parametrize("path", GENERATING)
def test_what_generates_tells_every_refusal_and_that_it_streams(schema, path):
    responses = schema["paths"][path]["post"]["responses"]
    assert set(responses) == {"200", *REFUSALS} - {"401"}
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "Retry-After" in responses["429"]["headers"]


def test_embeddings_tell_every_refusal_and_do_not_stream(schema):
    responses = schema["paths"]["/v1/embeddings"]["post"]["responses"]
    assert set(responses) == {"200", *REFUSALS} - {"401"}
    assert set(responses["200"]["content"]) == {"application/json"}


def test_every_status_of_an_error_is_a_refusal_that_is_told():
    assert {str(answer.status) for answer in ANSWERS.values()} <= set(REFUSALS)
    full = Admission(1)
    with full.sequences(1), pytest.raises(ApiError) as refused, full.sequences(1):
        pass
    assert str(refused.value.status) in REFUSALS


def test_a_refusal_is_what_the_schema_says(schema, server):
    shape = schema["components"]["schemas"]["Error"]
    for answer in (
        server.post("/v1/completions"),
        server.post("/v1/completions", model="other", prompt="a"),
        server.client.get("/v1/models/other"),
    ):
        jsonschema.validate(answer.json(), shape)


def test_limits_are_those_of_the_server(server):
    config = ServerConfig(max_n=3, max_logprobs=5, api_key=["key"])
    shown = build_app(config, server.host, DEMO).openapi()
    fields = shown["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 3}
    assert fields["top_logprobs"]["anyOf"][0]["maximum"] == 5
    assert fields["temperature"]["anyOf"][0]["minimum"] == 0
    assert "minimum" not in fields["logprobs"]["anyOf"][0]  # here it is a yes or no
    fields = shown["components"]["schemas"]["ResponseRequest"]["properties"]
    assert fields["max_output_tokens"]["anyOf"][0]["minimum"] == 1
    assert fields["top_logprobs"]["anyOf"][0]["maximum"] == 5
    answer = shown["components"]["schemas"]["ResponseObject"]["properties"]
    assert "minimum" not in answer["temperature"]


def test_keys_are_asked_for_where_there_are_some(schema, server):
    shown = build_app(ServerConfig(api_key=["key"]), server.host, DEMO).openapi()
    for path, _, operation in operations(shown):
        is_open = path in ("/health", "/ready", "/version")
        assert ("401" in operation["responses"]) == ("security" in operation) == (not is_open)
    assert "securitySchemes" not in schema["components"]
    assert not any("401" in operation["responses"] for _, _, operation in operations(schema))


def test_messages_that_the_schema_allows_are_served(schema, server):
    shape = schema["components"]["schemas"]["ChatRequest"]["properties"]["messages"]
    parts = [{"type": "text", "text": "a"}, "b"]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "d"},
    ]
    jsonschema.validate(messages, shape)
    answer = server.post("/v1/chat/completions", messages=messages, max_tokens=1)
    assert answer.status_code == 200
    for wrong in ([], [{"role": "user"}], [{"role": "", "content": "a"}]):
        assert not jsonschema.Draft202012Validator(shape).is_valid(wrong)
        assert server.post("/v1/chat/completions", messages=wrong).status_code == 400
