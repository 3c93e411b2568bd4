"""What is refused, with which status, and that the error object says which field is to blame."""

import json

import pytest
from running_server import RunningServer

from autodeploy import errors
from autodeploy.server.errors import ANSWERS, as_api_error

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
JSON = {"content-type": "application/json"}
ASKED = {"messages": [{"role": "user", "content": "a"}]}


def refused(response, status, **error):
    assert response.status_code == status, response.text
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["message"]
    assert {name: found[name] for name in error} == error
    return found["message"]


def test_every_error_of_the_tree_has_its_answer():
    classes = {
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.AutodeployError)
    }
    assert set(ANSWERS) == classes
    for kind in classes:
        problem = as_api_error(kind("a secret path"))
        assert problem.status in (400, 500, 503)
        assert ("secret" in str(problem)) != ANSWERS[kind].hides_message
    assert "secret" not in str(as_api_error(RuntimeError("secret")))


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {**ASKED, "temperature": "1"}, "temperature"),
        (CHAT, {**ASKED, "temperature": -1}, "temperature"),
        (CHAT, {**ASKED, "top_p": 2}, "top_p"),
        (CHAT, {**ASKED, "n": 0}, "n"),
        (CHAT, {**ASKED, "n": 1000}, "n"),
        (CHAT, {**ASKED, "max_tokens": 0}, "max_tokens"),
        (CHAT, {**ASKED, "top_logprobs": 2}, "top_logprobs"),
        (CHAT, {**ASKED, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {**ASKED, "stream_options": {}}, "stream_options"),
        (CHAT, {**ASKED, "logit_bias": {"a": 1}}, "logit_bias"),
        (CHAT, {**ASKED, "modalities": ["audio"]}, "modalities"),
        (CHAT, {**ASKED, "tool_choice": "required"}, "tool_choice"),
        (CHAT, {**ASKED, "response_format": {"type": "xml"}}, "response_format.type"),
        (CHAT, {**ASKED, "response_format": {"type": "json_schema"}},
         "response_format.json_schema"),
        (CHAT, {**ASKED, "chat_template": "{{ 1 }}"}, "chat_template"),
        (CHAT, {**ASKED, "functions": []}, "functions"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "a"}, "messages"),
        (CHAT, {"messages": [{"content": "a"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages[0].content[0].type"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHAT, {**ASKED, "tools": [{"type": "function"}]}, "tools[0].function"),
        (CHAT, {**ASKED, "chat_template_kwargs": {"tokenize": True}}, None),
        (CHAT, {**ASKED, "chat_template_kwargs": {"tools": 3}}, None),
        (CHAT, {**ASKED, "\ud800": 3}, None),
        (CHAT, {}, "messages"),
        (TEXT, {}, "prompt"),
        (TEXT, {"prompt": []}, "prompt"),
        (TEXT, {"prompt": [[]]}, None),
        (TEXT, {"prompt": [1, -1]}, None),
        (TEXT, {"prompt": [10**6]}, None),
        (TEXT, {"prompt": "\ud800"}, None),
        (TEXT, {"prompt": "a", "best_of": 3}, "best_of"),
        (TEXT, {"prompt": "a", "suffix": "b"}, "suffix"),
        (TEXT, {"prompt": "a", "logprobs": 50}, "logprobs"),
        (TEXT, {"prompt": "a", "stop": ["s"] * 40}, "stop"),
        (TEXT, {"prompt": "a", "stop": "s" * 2000}, "stop"),
        (TEXT, {"prompt": "a", "stop": [""]}, "stop"),
        (TEXT, {"prompt": "a", "seed": 2**70}, "seed"),
        (TEXT, {"prompt": "a", "priority": 2**70}, None),
        (TEXT, {"prompt": ["a"] * 2000}, "prompt"),
        ("/tokenize", {}, "prompt"),
        ("/detokenize", {"tokens": [10**6]}, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_served_is_a_400(server, path, fields, param, stream):
    body = {**fields, "stream": True} if stream and path.startswith("/v1") else fields
    if "stream_options" in fields:
        body = fields
    response = server.client.post(path, content=json.dumps(body), headers=JSON)
    refused(response, 400, param=param, type="invalid_request_error")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"\xff", b'{"prompt": NaN}'])
def test_a_body_that_is_no_request_is_a_400(server, body):
    response = server.client.post(TEXT, content=body, headers=JSON)
    refused(response, 400)


def test_another_method_is_a_405_that_tells_all_that_are_taken(server):
    for path, taken in ((TEXT, "POST"), ("/v1/responses/x", "DELETE, GET"), ("/health", "GET")):
        response = server.client.put(path)
        refused(response, 405)
        assert response.headers["allow"] == taken


@pytest.mark.parametrize("levels", [70, 400])
@pytest.mark.parametrize("field", ["response_format", "tools"])
def test_a_schema_nested_too_deep_is_a_400(server, field, levels):
    schema = {}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    tool = {"type": "function", "function": {"name": "a", "parameters": schema}}
    asked = {
        "response_format": {"response_format": form},
        "tools": {"tools": [tool], "tool_choice": "required"},
    }[field]
    refused(server.post(CHAT, **ASKED, **asked), 400)


def test_unknown_fields_are_refused_as_openai_does(server):
    message = refused(
        server.post(TEXT, prompt="a", temprature=1), 400, param="temprature",
        code="unknown_parameter",
    )  # fmt: skip
    assert message == "Unrecognized request argument supplied: temprature"


def test_other_paths_methods_and_models(server):
    refused(server.client.get("/nothing"), 404)
    refused(server.client.get(TEXT), 405)
    refused(server.post(TEXT, model="other", prompt="a"), 404, code="model_not_found")
    half = b'{"model": "\\ud800", "prompt": "a"}'
    refused(server.client.post(TEXT, content=half, headers=JSON), 404, code="model_not_found")
    refused(server.client.get("/v1/models/other"), 404, code="model_not_found")


def test_prompts_beyond_the_context_have_their_own_code(server):
    for response in (
        server.post(TEXT, prompt=[5] * 2000),
        server.post(TEXT, prompt=["a", [5] * 2000][1]),
        server.post(CHAT, messages=[{"role": "user", "content": "word " * 3000}]),
    ):
        refused(response, 400, code="context_length_exceeded")


@pytest.fixture(scope="module")
def guarded():
    running = RunningServer(
        api_key=["first", "second"], max_request_bytes=2000, max_open_sequences=4,
        max_prompt_tokens=50, allowed_origins=["https://page.example"], root_path="/llm",
        trust_request_chat_template=True,
    )  # fmt: skip
    yield running
    running.close()


def test_a_key_is_needed_and_any_of_them_will_do(guarded, caplog):
    for header in (None, "first", "Bearer third", "Bearer firs", "Basic first", "Bearer é"):
        headers = {} if header is None else {"Authorization": header.encode()}
        response = guarded.client.get("/v1/models", headers=headers)
        refused(response, 401, code="invalid_api_key")
        assert "first" not in response.text
    for key in ("first", "second"):
        headers = {"Authorization": f"Bearer {key}"}
        assert guarded.client.get("/v1/models", headers=headers).status_code == 200
    for path in ("/health", "/ready", "/version", "/llm/health"):
        assert guarded.client.get(path).status_code == 200
    assert "first" not in repr(guarded.service.config)


@pytest.fixture
def keyed(guarded):
    guarded.client.headers["Authorization"] = "Bearer first"
    yield guarded
    del guarded.client.headers["Authorization"]


def test_a_large_body_is_a_413_whether_it_says_so_or_not(keyed):
    body = json.dumps({"prompt": "a" * 3000}).encode()
    headers = {"content-type": "application/json"}
    refused(keyed.client.post(TEXT, content=body, headers=headers), 413)
    refused(keyed.client.post(TEXT, content=iter([body[:1000], body[1000:]]), headers=headers), 413)


def test_more_sequences_than_there_are_places_is_a_429_with_retry_after(keyed):
    fields = {"prompt": "a", "max_tokens": 300, "ignore_eos": True, "stream": True}
    with keyed.client.stream("POST", TEXT, json={**fields, "n": 3}) as response:
        lines = response.iter_lines()  # dropped, it would close the response
        next(lines)
        for stream in (False, True):
            answer = keyed.post(TEXT, prompt="a", n=2, stream=stream)
            refused(answer, 429, code="rate_limit_exceeded", type="rate_limit_error")
            assert answer.headers["retry-after"] == "1"
        assert keyed.post(TEXT, prompt="a", max_tokens=1).status_code == 200
    refused(keyed.post(TEXT, prompt=["a"] * 5), 400)


def test_a_prompt_limit_below_the_context_holds(keyed):
    refused(keyed.post(TEXT, prompt=[5] * 51), 400, code="context_length_exceeded")
    assert keyed.post(TEXT, prompt=[5] * 50, max_tokens=1).status_code == 200


def test_pages_of_the_allowed_origin_may_call_and_no_others(keyed, server):
    ask = {"Access-Control-Request-Method": "POST", "Origin": "https://page.example"}
    allowed = "access-control-allow-origin"
    assert keyed.client.options(TEXT, headers=ask).headers[allowed] == "https://page.example"
    other = {**ask, "Origin": "https://other.example"}
    assert allowed not in keyed.client.options(TEXT, headers=other).headers
    assert allowed not in server.client.get("/version", headers={"Origin": "x"}).headers


def test_a_chat_template_of_the_request_is_used_where_that_is_allowed(keyed):
    fields = {"messages": ASKED["messages"], "chat_template": "x{{ messages[0].content }}"}
    found = keyed.post("/tokenize", **fields).json()["tokens"]
    assert keyed.post("/detokenize", tokens=found).json()["prompt"] == "xa"


def test_a_request_id_is_given_back_or_made(server):
    given = server.client.get("/version", headers={"X-Request-Id": "abc"})
    assert given.headers["x-request-id"] == "abc"
    made = server.client.get("/nothing").headers["x-request-id"]
    assert len(made) == 32
    for bad in ("a b", "x" * 200):
        response = server.client.get("/version", headers={"X-Request-Id": bad})
        assert response.headers["x-request-id"] != bad
