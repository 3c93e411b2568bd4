"""What the server is joined of: constraints on outputs, metrics, the page and its status."""

import json

import pytest
from running_server import RunningServer

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "maximum": 20}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}}
ASKED = {"messages": [{"role": "user", "content": "a pet"}], "max_tokens": 60, "temperature": 0}


def test_a_message_follows_the_schema_that_is_asked_for(server):
    answer = server.post("/v1/chat/completions", **ASKED, response_format=FORMAT).json()
    pet = json.loads(answer["choices"][0]["message"]["content"])
    assert pet["kind"] in ("cat", "dog")
    assert isinstance(pet["age"], int)
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_streamed_text_follows_the_schema_too(server):
    text = ""
    fields = {"prompt": "a pet: ", "max_tokens": 60, "temperature": 0, "stream": True}
    with server.client.stream(
        "POST", "/v1/completions", json={**fields, "response_format": FORMAT}
    ) as lines:
        for line in lines.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
    assert set(json.loads(text)) == {"kind", "age"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_cannot_be_compiled_is_refused_with_the_reason(server, stream):
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    answer = server.post("/v1/chat/completions", **ASKED, response_format=wrong, stream=stream)
    assert answer.status_code == 400
    assert "nothing" in answer.json()["error"]["message"]


def test_requests_are_counted(server):
    def finished():
        lines = server.client.get("/metrics").text.splitlines()
        return sum(
            float(line.split()[-1])
            for line in lines
            if line.startswith("vllm:request_success_total{")
        )

    before = finished()
    server.post("/v1/chat/completions", **ASKED)
    server.post("/v1/completions", prompt=["a", "b"], max_tokens=2)
    assert finished() == before + 3


def test_the_page_is_there_and_has_something_to_show(server):
    assert "<html" in server.client.get("/").text
    status = server.client.get("/api/status").json()
    assert status["model"] == "demo"
    assert any(step["matches"] for step in status["transforms"])


def test_with_keys_the_page_opens_and_what_it_shows_is_locked():
    running = RunningServer(api_key=["secret"])
    try:
        assert running.client.get("/").status_code == 200
        for path in ("/api/status", "/metrics"):
            assert running.client.get(path).status_code == 401
            key = {"Authorization": "Bearer secret"}
            assert running.client.get(path, headers=key).status_code == 200
    finally:
        running.close()
