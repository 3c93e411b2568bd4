"""The client that makes load, and `bench serve --base-url`, on a server of the demo model."""

import asyncio
import json
import time
from unittest.mock import Mock

import pytest

from autodeploy.bench.http_client import (
    Address,
    Connection,
    Connections,
    LoadError,
    completion_tokens,
)
from autodeploy.bench.latencies import Served
from autodeploy.bench.processes import cpu_seconds, engine_of, resident_bytes
from autodeploy.bench.remote import Load, run_load
from autodeploy.bench.workload import ragged
from autodeploy.cli.main import main
from autodeploy.errors import ConfigError

WORK = ragged(6, (3, 9), (4, 12), vocab=1000)


@pytest.mark.parametrize("streams", [True, False])
def test_every_request_is_answered_with_the_tokens_it_asked_for(server, streams):
    run = run_load(Address.of(server.url), "demo", WORK, Load(streams=streams, concurrency=2))
    assert not run.failed
    assert sorted(s.tokens for s in run.served) == sorted(WORK.outputs)
    assert run.tokens == WORK.output_tokens
    assert all(s.due < s.times[0] <= s.times[-1] for s in run.served)


def chunked(events):
    pieces = [b"data: " + json.dumps(e, separators=(",", ":")).encode() + b"\n\n" for e in events]
    pieces.append(b"data: [DONE]\n\n")
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 2, 7, 50, 10_000])
async def test_events_are_counted_wherever_the_network_cuts_them(size):
    events = [{"choices": [{"text": text}]} for text in ("a", "\ndata: {", '"choices":[]', "0\r\n")]
    usage = {"choices": [], "usage": {"completion_tokens": 7}}
    answer = chunked([*events, usage])
    heard, connection = Served(0.0), Connection()
    connection.connection_made(Mock())
    asking = asyncio.create_task(connection.ask(b"", heard, None))
    await asyncio.sleep(0)
    for at in range(0, len(answer), size):
        assert not asking.done()
        connection.data_received(answer[at : at + size])
    assert completion_tokens(await asking) == 7
    assert heard.events == len(events)
    assert len(heard.times) == (len(events) if size < 7 else len(set(heard.times)))


async def test_a_stream_without_usage_or_with_an_error_is_a_failure():
    for events, message in (
        ([{"choices": [{"text": "a"}]}], "no usage"),
        ([{"choices": [{"text": "a"}]}, {"error": {"message": "gone"}}], "gone"),
    ):
        connection = Connection()
        connection.connection_made(Mock())
        asking = asyncio.create_task(connection.ask(b"", Served(0.0), None))
        await asyncio.sleep(0)
        connection.data_received(chunked(events))
        with pytest.raises(LoadError, match=message):
            completion_tokens(await asking)


async def test_who_leaves_after_some_output_hears_no_more(server):
    address, heard = Address.of(server.url), Served(0.0)
    body = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": True}
    connections = Connections(address)
    request = address.request("POST", "/v1/completions", body)
    assert await connections.ask(request, heard, reads=3) == b""
    assert 1 <= len(heard.times) <= 3
    deadline = time.monotonic() + 10
    while server.service.admission.open:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_a_refused_request_is_a_failure_with_the_servers_words(server):
    run = run_load(Address.of(server.url), "another", WORK, Load())
    assert len(run.failed) == len(WORK.prompts)
    assert "status 404" in run.failed[0]
    assert "does not exist here" in run.failed[0]


def test_nobody_at_the_address_is_a_failure():
    run = run_load(Address.of("http://127.0.0.1:9"), "demo", WORK, Load())
    assert "cannot connect to 127.0.0.1 port 9" in run.failed[0]


def test_bench_serve_measures_a_server_that_runs(server, tmp_path, capsys):
    file = tmp_path / "figures.json"
    arguments = "--num-prompts 5 --random-input-len 4:8 --random-output-len 3:6 --concurrency 2"
    words = ["bench", "serve", "--base-url", server.url, *arguments.split(), "--json", str(file)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "2 at once, streamed" in shown
    report = json.loads(file.read_text())
    first, *others = report["results"]
    assert (report["model"], first["failed"]) == ("demo", 0)
    assert {"TTFT p99", "ITL p99", "TPOT p50", "E2E p50"} <= {row["name"] for row in others}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--concurrency", "2"], "name it with --base-url"),
        (["--base-url", "ftp://here"], "must be like http://HOST:PORT"),
        (["--base-url", "http://127.0.0.1:9"], "give --model NAME and --vocab N"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_way_out(words, message, capsys):
    assert main(["bench", "serve", *words]) != 0
    assert message in capsys.readouterr().err


def test_an_address_has_the_servers_path_and_the_key():
    address = Address.of("https://here/llm/v1/", "KEY")
    assert (address.port, address.secure, address.path) == (443, True, "/llm")
    request = address.request("POST", "/v1/completions", {"a": 1})
    assert request.startswith(b"POST /llm/v1/completions HTTP/1.1\r\nHost: here:443\r\n")
    assert b"Authorization: Bearer KEY\r\n" in request
    assert request.endswith(b'\r\n\r\n{"a":1}')
    with pytest.raises(ConfigError, match="must be like"):
        Address.of("here:8000")


def test_a_process_without_children_has_no_engine():
    import os
    import subprocess
    import sys

    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert cpu_seconds(os.getpid()) > 0
        assert resident_bytes(child.pid) > 0
        with pytest.raises(ProcessLookupError, match="no engine"):
            engine_of(child.pid)
    finally:
        child.communicate(b"\n")
