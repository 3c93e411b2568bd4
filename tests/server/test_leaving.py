"""Clients that leave, requests that take too long, servers that stop, engines that die."""

import asyncio
import json
import threading

import httpx
import pytest
from running_server import RunningServer, demo_engine, eventually

from autodeploy.errors import ConfigError
from autodeploy.runtime.sampling_params import SamplingParams

TEXT = "/v1/completions"
EVERYWHERE = {
    TEXT: {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/responses": {"input": "a"},
}
LONG = {"prompt": "a", "max_tokens": 900, "ignore_eos": True}


@pytest.fixture
def own():
    made = []

    def make(**options):
        made.append(RunningServer(**options))
        return made[-1]

    yield make
    for running in made:
        running.close()


def idle(running):
    eventually(lambda: running.service.admission.open == 0)
    eventually(lambda: running.host.llm.open_requests == 0)
    eventually(lambda: running.pages_used() == 0)


def in_thread(running, **fields):
    """A whole answer, asked for in another thread; a list that will hold it."""
    found = []

    def ask():
        found.append(httpx.post(running.url + TEXT, json=fields, timeout=30))

    thread = threading.Thread(target=ask)
    thread.start()
    eventually(lambda: running.service.admission.open > 0)
    return thread, found


def error_of(lines):
    assert lines[-1] == "data: [DONE]"
    return json.loads(lines[-2].removeprefix("data: "))["error"]


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"prompt": ["a", "b"]}])
def test_a_reader_who_leaves_a_stream_frees_its_pages(server, fields):
    with server.client.stream("POST", TEXT, json={**LONG, "stream": True, **fields}) as response:
        lines = response.iter_lines()  # dropped, it would close the response
        next(lines)
        assert server.service.admission.open > 0
    idle(server)


@pytest.mark.parametrize("fields", [{}, {"prompt": ["a", "b"]}])
def test_a_client_who_gives_up_on_a_whole_answer_frees_its_pages(server, fields):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + TEXT, json={**LONG, "n": 4, **fields}, timeout=0.3)
    idle(server)


def test_at_most_one_step_begins_with_a_request_that_was_left(server, monkeypatch):
    llm = server.host.llm
    engine = llm._executor._engine
    step, live = engine.step, []

    def counted():
        live.append(len(engine._requests))
        return step()

    async def leave():
        outputs = llm.generate("a", SamplingParams(max_tokens=900, ignore_eos=True))
        await anext(outputs)
        await outputs.aclose()
        return len(live)

    monkeypatch.setattr(engine, "step", counted)
    begun = asyncio.run(leave())
    eventually(lambda: llm.open_requests == 0)
    assert sum(live[begun:]) <= 1
    monkeypatch.undo()
    idle(server)


def test_one_bad_prompt_of_several_aborts_the_others(server):
    response = server.post(TEXT, **{**LONG, "prompt": [[5], [10**6]]})
    assert response.status_code == 400
    idle(server)


def test_a_request_that_takes_too_long_ends_with_an_error(own):
    running = own(request_timeout=1.0)
    response = running.post(TEXT, **LONG)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "request_timeout"
    assert response.headers["x-should-retry"] == "false"
    with running.client.stream("POST", TEXT, json={**LONG, "stream": True}) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert error_of(lines)["code"] == "request_timeout"
    assert len(lines) > 3
    idle(running)


def test_a_stopping_server_refuses_new_requests_and_finishes_open_ones(own):
    running = own(shutdown_timeout=20)
    fields = {**LONG, "max_tokens": 300, "stream": True}
    with running.client.stream("POST", TEXT, json=fields) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert httpx.get(running.url + "/ready").status_code == 200
        running.stop()
        eventually(lambda: httpx.get(running.url + "/ready").status_code == 503)
        assert httpx.get(running.url + "/health").status_code == 200
        for path, body in EVERYWHERE.items():
            refused = httpx.post(running.url + path, json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        rest = [line for line in lines if line]
    assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
    running.join()
    assert running.server.status == 0


def test_a_stopping_server_finishes_what_is_open_on_every_replica(own):
    running = own(shutdown_timeout=20, replicas=2)
    threads = [in_thread(running, **{**LONG, "max_tokens": 300, "prompt": p}) for p in ("a", "b")]
    eventually(lambda: [llm.open_requests for llm in running.host.llms] == [1, 1])
    running.stop()
    for thread, answers in threads:
        thread.join()
        assert answers[0].json()["choices"][0]["finish_reason"] == "length"
    running.join()
    assert running.server.status == 0


@pytest.mark.parametrize(
    ("tokens", "seconds", "end"), [(300, 20, "incomplete"), (900, 0.2, "failed")]
)
def test_a_response_goes_on_in_a_stopping_server_until_the_deadline(own, tokens, seconds, end):
    running = own(shutdown_timeout=seconds)
    body = {"input": "a", "max_output_tokens": tokens, "ignore_eos": True, "stream": True}
    with running.client.stream("POST", "/v1/responses", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        running.stop()
        last = [line for line in lines if line.startswith("data: ")][-1]
    assert json.loads(last.removeprefix("data: "))["type"] == f"response.{end}"
    running.join()
    assert running.server.status == 0


def test_what_is_open_after_the_shutdown_timeout_ends_with_an_error(own):
    running = own(shutdown_timeout=0.2)
    thread, whole = in_thread(running, **LONG)
    with running.client.stream("POST", TEXT, json={**LONG, "stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        running.stop()
        rest = [line for line in lines if line]
    assert error_of(rest)["code"] == "shutting_down"
    thread.join()
    assert whole[0].status_code == 503
    running.join()


def test_a_second_signal_does_not_wait(own):
    running = own(shutdown_timeout=1000)
    with running.client.stream("POST", TEXT, json={**LONG, "stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        running.stop()
        eventually(lambda: running.service.admission.draining)
        running.stop()
        assert error_of([line for line in lines if line])["code"] == "shutting_down"
    running.join()
    assert running.server.status == 0


def die(running):
    def broken():
        raise RuntimeError("the device fell off")

    running.host.llm._executor._engine.step = broken


def test_without_a_living_replica_nothing_is_served_until_one_is_back(own):
    may_build = threading.Event()

    def build():
        assert may_build.wait(20)
        return demo_engine()

    running = own(build=build, replicas=2)
    for _ in range(2):
        die(running)
        dying = running.host.llm
        assert running.post(TEXT, **LONG).status_code == 503
        eventually(lambda dying=dying: dying.death is not None)
    assert running.client.get("/health").json()["status"] == "dead"
    assert running.client.get("/api/status").json()["state"] == "dead"
    refused = running.post(TEXT, prompt="a").json()["error"]
    assert "it is being started again" in refused["message"]
    may_build.set()
    eventually(lambda: running.client.get("/api/status").json()["state"] == "ok", 30)
    assert running.post(TEXT, prompt="a").status_code == 200
    assert running.host.restarts == 2


def test_an_engine_that_dies_is_told_to_everyone_and_ends_the_server(own):
    running = own()
    thread, whole = in_thread(running, **LONG)
    with running.client.stream("POST", TEXT, json={**LONG, "stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        die(running)
        rest = [line for line in lines if line]
    assert error_of(rest)["code"] == "engine_dead"
    thread.join()
    assert (whole[0].status_code, whole[0].json()["error"]["code"]) == (503, "engine_dead")
    running.join()
    assert running.server.status == 1


def test_of_several_one_that_dies_and_stays_dead_lets_the_others_finish_and_ends_the_server(own):
    running = own(replicas=2, shutdown_timeout=20)
    ask = {**LONG, "stream": True}
    with (
        running.client.stream("POST", TEXT, json=ask) as first,
        running.client.stream("POST", TEXT, json={**ask, "max_tokens": 300}) as second,
    ):
        lines = [first.iter_lines(), second.iter_lines()]
        for each in lines:
            next(each)
        assert [llm.open_requests for llm in running.host.llms] == [1, 1]
        die(running)
        assert error_of([line for line in lines[0] if line])["code"] == "engine_dead"
        assert httpx.get(running.url + "/health").json() == {"status": "degraded"}
        eventually(lambda: httpx.get(running.url + "/ready").status_code == 503)
        rest = [line for line in lines[1] if line]
    assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
    running.join()
    assert running.server.status == 1


def test_an_engine_that_dies_is_started_again_if_that_is_the_policy(own):
    may_build = threading.Event()
    failures = [RuntimeError("no device"), ConfigError("no memory")]

    def build():
        may_build.wait(10)
        if failures:
            raise failures.pop()
        return demo_engine()

    running = own(build=build)
    with running.client.stream("POST", TEXT, json={**LONG, "stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        die(running)
        assert error_of([line for line in lines if line])["code"] == "engine_dead"
    for path in ("/health", "/ready"):
        assert running.client.get(path).status_code == 503
    refused = running.post(TEXT, prompt="a")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    may_build.set()
    eventually(lambda: running.client.get("/health").status_code == 200)
    assert running.post(TEXT, prompt="a").status_code == 200
    assert running.host.restarts == 1


def test_a_server_that_stops_does_not_wait_for_an_engine_that_is_being_built(own):
    building, may_build, built = threading.Event(), threading.Event(), []

    def build():
        building.set()
        assert may_build.wait(60)
        built.append(demo_engine())
        return built[0]

    running = own(build=build)
    die(running)
    assert running.post(TEXT, **LONG).status_code == 503
    assert building.wait(20)
    running.stop()
    running.join()
    assert running.server.status == 0
    may_build.set()
    eventually(lambda: built and built[0].death is not None, 30)
