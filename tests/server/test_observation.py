"""Request ids, logs and traces: what is written down of a request, and what never is."""

import asyncio
import io
import json
import logging
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import httpx
import pytest
from fastapi import FastAPI
from observed_app import deployed, observed_app

from autodeploy.cli.main import own_logging
from autodeploy.errors import ConfigError
from autodeploy.server.logs import set_up_logging
from autodeploy.server.observation import Observation
from autodeploy.server.traces import Traces

SECRET = "sk-never-show-this"
PROMPT = "a prompt that nobody else reads"


@pytest.fixture
def logs():
    """Set-up of logging that is undone."""
    stream = io.StringIO()
    with own_logging(False):
        yield lambda log_format, level=logging.INFO: (
            set_up_logging(log_format, level, stream), stream
        )  # fmt: skip


def client_of(app):
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server")


def small_app(**options):
    app = FastAPI()

    @app.get("/health")
    async def health():
        return {}

    @app.get("/items/{name}")
    async def item(name: str):
        logging.getLogger("autodeploy").info("looking")
        if name == "broken":
            raise RuntimeError("it broke")
        return {}

    app.add_middleware(Observation, **options)
    return app


async def generate(client, **more):
    headers = {"Authorization": f"Bearer {SECRET}", "X-Request-Id": "mine-1", **more}
    body = {"prompt": PROMPT, "max_tokens": 5, "ignore_eos": True, "stream": True}
    return await client.post(f"/v1/completions?key={SECRET}", json=body, headers=headers)


async def test_an_access_line_has_counts_and_times_and_no_secrets(logs):
    async with deployed() as llm:
        for log_format in ("json", "text"):
            _, stream = logs(log_format, logging.DEBUG)
            async with client_of(observed_app(llm, key=SECRET)) as client:
                response = await generate(client)
            assert response.headers["x-request-id"] == "mine-1"
            written = stream.getvalue()
            assert SECRET not in written
            assert PROMPT not in written
            assert "mine-1" in written
            assert "POST /v1/completions 200" in written
            if log_format == "json":
                (line,) = [x for x in map(json.loads, written.splitlines()) if "status" in x]
                assert line["request_id"] == "mine-1"
                assert line["output_tokens"] == 5
                assert line["prompt_tokens"] > 5
                assert line["finish_reasons"] == ["length"]
                assert 0 < line["first_token_seconds"] < line["seconds"] < 60


async def test_lines_of_a_request_carry_its_id(logs):
    _, stream = logs("json")
    async with client_of(small_app()) as client:
        ids = [(await client.get("/items/a")).headers["x-request-id"] for _ in range(2)]
    assert ids[0] != ids[1]
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["request_id"] for line in lines] == [ids[0], ids[0], ids[1], ids[1]]


@pytest.mark.parametrize("given", ["", "x" * 129, "two words", "a\tb", "é"])
async def test_an_id_that_cannot_be_logged_is_replaced(given):
    async with client_of(small_app()) as client:
        response = await client.get("/health", headers={"X-Request-Id": given.encode()})
    assert response.headers["x-request-id"] != given
    assert len(response.headers["x-request-id"]) == 32


async def test_a_path_cannot_write_a_line_of_its_own(logs):
    _, stream = logs("text")
    async with client_of(small_app()) as client:
        await client.get("/x%0a2026 INFO forged")
    assert len(stream.getvalue().splitlines()) == 1


async def test_an_error_is_logged_with_its_type(logs):
    _, stream = logs("json")
    async with client_of(small_app()) as client:
        assert (await client.get("/items/broken")).status_code == 500
    line = json.loads(stream.getvalue().splitlines()[-1])
    assert (line["status"], line["error"]) == (500, "RuntimeError")


async def test_probes_are_logged_only_when_asked_for(logs):
    _, stream = logs("text")
    async with client_of(small_app()) as client:
        await client.get("/health")
        assert not stream.getvalue()
        logs("text", logging.DEBUG)
        await client.get("/health")
    assert "GET /health 200" in stream.getvalue()


async def test_a_client_that_leaves_is_an_abort(logs):
    _, stream = logs("json")
    async with deployed() as llm:
        app = observed_app(llm)
        body = json.dumps({"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True})
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1", "method": "POST", "path": "/v1/completions",
            "raw_path": b"/v1/completions", "query_string": b"", "headers": [],
        }  # fmt: skip
        left = asyncio.Event()
        messages = iter([{"type": "http.request", "body": body.encode()}])

        async def receive():
            message = next(messages, None)
            if message is None:
                await left.wait()
            return message or {"type": "http.disconnect"}

        async def send(message):
            if message.get("body"):
                left.set()

        await app(scope, receive, send)
        assert app.state.metrics.requests[0].finished["abort"] == 1
        while llm.open_requests:
            await asyncio.sleep(0.01)
    line = json.loads(stream.getvalue().splitlines()[-1])
    assert line["finish_reasons"] == ["abort"]
    assert 0 < line["output_tokens"] < 400


async def test_a_request_is_a_span_of_its_callers_trace():
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    traces = Traces("http://localhost:4318/v1/traces", exporter=exporter)
    trace = "0af7651916cd43dd8448eb211c80319c"
    async with deployed() as llm, client_of(observed_app(llm, traces)) as client:
        await generate(client, traceparent=f"00-{trace}-b7ad6b7169203331-01")
        await client.get("/metrics")
    traces.shutdown()
    (span,) = exporter.get_finished_spans()
    assert span.name == "text_completion demo"
    assert format(span.context.trace_id, "032x") == trace
    assert span.end_time > span.start_time
    said = dict(span.attributes)
    assert said["gen_ai.request.model"] == "demo"
    assert said["gen_ai.request.max_tokens"] == 5
    assert said["gen_ai.usage.output_tokens"] == 5
    assert said["gen_ai.usage.input_tokens"] > 5
    assert said["gen_ai.response.finish_reasons"] == ("length",)
    assert said["gen_ai.request.id"] == "mine-1"
    assert said["gen_ai.latency.time_to_first_token"] < said["gen_ai.latency.e2e"]
    assert PROMPT not in str(said)
    assert SECRET not in str(said)


def test_spans_arrive_at_the_endpoint():
    pytest.importorskip("opentelemetry.sdk")
    from autodeploy.server.record import RequestRecord

    came = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            came.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        traces = Traces(f"http://127.0.0.1:{server.server_port}/v1/traces")
        traces.report(RequestRecord("r", path="/v1/chat/completions", model="demo"), {})
        traces.shutdown()
        server.shutdown()
    ((path, _),) = came
    assert path == "/v1/traces"


def test_an_endpoint_that_is_no_url_is_refused():
    with pytest.raises(ConfigError, match="http URL"):
        Traces("localhost:4317")


def test_opentelemetry_sdk_is_imported_only_when_asked():
    code = (
        "import sys; import autodeploy.server.observation, autodeploy.server.traces; "
        "print([m for m in sys.modules if m.startswith('opentelemetry.sdk')])"
    )
    run = [sys.executable, "-c", code]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == "[]"
