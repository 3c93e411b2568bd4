"""Metrics: what /metrics says of requests that finish, stop, stream, leave and fail."""

import asyncio

import httpx
import pytest
from fastapi import FastAPI
from observed_app import deployed, observed_app
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from autodeploy import SamplingParams
from autodeploy.errors import EngineError, InvalidRequestError
from autodeploy.outputs import CompletionOutput, RequestOutput
from autodeploy.runtime.messages import EngineStats, RequestMetrics
from autodeploy.server.engine_metrics import ENGINE_METRICS
from autodeploy.server.histogram import Histogram, token_counts
from autodeploy.server.metrics import ServerMetrics
from autodeploy.server.watch import RequestWatch

LABELS = {"model_name": "demo", "engine": "0"}


class Engine:
    """An engine that has reported."""

    def __init__(self, **stats):
        self.stats = EngineStats(**stats)
        self.open_requests = 0
        self.max_model_len = 2048


def read(text):
    """Values by sample name and labels beyond those that all have."""
    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            extra = {k: v for k, v in sample.labels.items() if k not in LABELS}
            values[sample.name, *extra.values()] = sample.value
    return values


def values_of(metrics):
    return read(metrics.text().decode())


def output(tokens, reason=None, timing=None, prompt=5, index=0):
    part = CompletionOutput(index, token_ids=list(range(tokens)), finish_reason=reason)
    return RequestOutput("r", None, [1] * prompt, [part], reason is not None, metrics=timing)


@pytest.fixture
def metrics():
    return ServerMetrics(lambda: [Engine()], "demo")


def test_every_number_of_the_engine_is_shown():
    stats = {name: at + 1 for at, name in enumerate(EngineStats.__struct_fields__)}
    values = values_of(ServerMetrics(lambda: [Engine(**stats)], "demo"))
    shown = {m.name: values[m.name + "_total" * (m.kind == "counter"),] for m in ENGINE_METRICS}
    assert shown["vllm:num_requests_running"] == stats["running"]
    assert shown["vllm:prefix_cache_hits"] == stats["prefix_hits"]
    assert shown["vllm:kv_cache_usage_perc"] == stats["pages_used"] / stats["pages_total"]
    assert shown["autodeploy:graph_misses"] == stats["graph_misses"]
    # What a step scheduled is a gauge of one step, which a scrape sees by chance only; requests
    # are counted by the server.
    left_out = {"scheduled_tokens", "finished", "pages_used"}
    assert {stats[n] for n in stats.keys() - left_out} <= set(shown.values())


def test_a_model_without_pages_uses_none_of_them(metrics):
    assert values_of(metrics)["vllm:kv_cache_usage_perc",] == 0


def test_every_metric_carries_the_model_and_the_engine(metrics):
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            assert sample.labels.items() >= LABELS.items() or family.name.endswith("http_responses")


def test_two_servers_in_one_process_count_apart():
    first, second = (ServerMetrics(lambda: [Engine()], name) for name in "ab")
    with RequestWatch(first, SamplingParams()) as watch:
        watch.observe(output(3, "stop"))
    assert values_of(first)["vllm:request_success_total", "stop"] == 1
    assert values_of(second)["vllm:request_success_total", "stop"] == 0


def test_a_streamed_request_is_timed_token_by_token(metrics):
    with RequestWatch(metrics, SamplingParams(max_tokens=50)) as watch:
        watch.observe(output(1))
        watch.observe(output(1))
        watch.observe(output(3))
        watch.observe(output(1, "length"))
    values = values_of(metrics)
    assert values["vllm:time_to_first_token_seconds_count",] == 1
    assert values["vllm:inter_token_latency_seconds_count",] == 5
    assert values["vllm:request_generation_tokens_sum",] == 6
    assert values["vllm:request_prompt_tokens_sum",] == 5
    assert values["vllm:prompt_tokens_total",] == 5
    assert values["vllm:request_params_max_tokens_sum",] == 50
    assert values["vllm:e2e_request_latency_seconds_count",] == 1
    assert values["vllm:request_success_total", "length"] == 1


def test_the_phases_are_those_of_the_engines_clock(metrics):
    timing = RequestMetrics(
        arrival_time=100.0, first_scheduled_time=101.0, first_token_time=103.0, finished_time=107.0
    )
    with RequestWatch(metrics, SamplingParams(), "final") as watch:
        watch.observe(output(5, "stop", timing))
    values = values_of(metrics)
    assert values["vllm:request_queue_time_seconds_sum",] == 1
    assert values["vllm:request_prefill_time_seconds_sum",] == 2
    assert values["vllm:request_decode_time_seconds_sum",] == 4
    assert values["vllm:request_inference_time_seconds_sum",] == 6
    assert values["vllm:request_time_per_output_token_seconds_sum",] == 1
    # It was not streamed: only the engine knows when tokens came.
    assert values["vllm:time_to_first_token_seconds_sum",] == 3
    assert values["vllm:inter_token_latency_seconds_sum",] == 4
    assert values["vllm:inter_token_latency_seconds_count",] == 4


def test_cumulative_outputs_count_each_token_once(metrics):
    with RequestWatch(metrics, SamplingParams(), "cumulative") as watch:
        watch.observe(output(1))
        watch.observe(output(4))
        watch.observe(output(4, "stop"))
    assert values_of(metrics)["vllm:request_generation_tokens_sum",] == 4


def test_sequences_of_one_request_are_timed_apart(metrics):
    with RequestWatch(metrics, SamplingParams(n=2)) as watch:
        for index in (0, 1, 0, 1):
            watch.observe(output(1, index=index))
    values = values_of(metrics)
    assert values["vllm:inter_token_latency_seconds_count",] == 2
    assert values["vllm:prompt_tokens_total",] == 5


@pytest.mark.parametrize(
    ("error", "reason"),
    [(asyncio.CancelledError(), "abort"), (GeneratorExit(), "abort"), (EngineError("x"), "error")],
)
def test_a_request_that_does_not_finish_is_counted_by_why(metrics, error, reason):
    with pytest.raises(type(error)), RequestWatch(metrics, SamplingParams()) as watch:
        watch.observe(output(1))
        raise error
    values = values_of(metrics)
    assert values["vllm:request_success_total", reason] == 1
    assert values["vllm:e2e_request_latency_seconds_count",] == 0


def test_a_refused_request_is_no_failed_one(metrics):
    with pytest.raises(InvalidRequestError), RequestWatch(metrics, SamplingParams()):
        raise InvalidRequestError("no")
    values = values_of(metrics)
    assert values["autodeploy:requests_refused_total",] == 1
    assert sum(v for k, v in values.items() if k[0] == "vllm:request_success_total") == 0


def test_a_histogram_counts_values_up_to_its_edges():
    histogram = Histogram("x", "", [1, 2])
    for value in (0.5, 1, 1.5, 2, 9):
        histogram.observe(value)
    histogram.observe(2, times=3)
    family = histogram.family([])
    histogram.add_to(family, [])
    by_edge = {s.labels["le"]: s.value for s in family.samples if "le" in s.labels}
    assert by_edge == {"1.0": 2, "2.0": 7, "+Inf": 8}
    assert token_counts(300) == [1, 2, 5, 10, 20, 50, 100, 200, 500]


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
async def test_a_scraper_gets_the_format_that_it_asks_for(accept):
    app = FastAPI()
    app.include_router(ServerMetrics(lambda: [Engine()], "demo").router())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        response = await client.get("/metrics", headers={"Accept": accept})
    assert response.headers["content-type"].startswith(
        accept.split(";")[0] or "text/plain; version"
    )
    parse = openmetrics_families if accept else text_string_to_metric_families
    names = {family.name for family in parse(response.text)}
    assert {"vllm:num_preemptions", "vllm:time_to_first_token_seconds"} <= names


def test_replicas_have_an_engine_label_each():
    metrics = ServerMetrics(lambda: [Engine(running=1), Engine(running=2)], "demo")
    with RequestWatch(metrics, SamplingParams(), engine=1) as watch:
        watch.observe(output(3, "stop"))
    values = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            labels = sample.labels
            key = (sample.name, labels.get("engine"), labels.get("finished_reason"))
            values.setdefault(key, sample.value)
    running = [values["vllm:num_requests_running", engine, None] for engine in "01"]
    finished = [values["vllm:request_success_total", engine, "stop"] for engine in "01"]
    tokens = [values["vllm:request_generation_tokens_sum", engine, None] for engine in "01"]
    assert (running, finished, tokens) == ([1, 2], [0, 1], [0, 3])


async def test_a_server_counts_what_its_clients_got():
    async with deployed() as llm:
        app = observed_app(llm)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            ask = {"prompt": "def fib(n):\n" * 8, "max_tokens": 12, "ignore_eos": True}
            streamed = await client.post("/v1/completions", json={**ask, "stream": True})
            assert "[DONE]" in streamed.text
            assert (await client.post("/v1/completions", json=ask)).status_code == 200
            await client.post("/v1/completions", json={**ask, "stop": ["e"], "max_tokens": 200})
            assert (await client.get("/nowhere/at/all")).status_code == 404
            # A stop string ends a request here first; the engine hears of it a step later.
            while values_of(app.state.metrics)["vllm:num_requests_running",]:
                await asyncio.sleep(0.01)
            values = read((await client.get("/metrics")).text)
    assert values["vllm:request_success_total", "length"] == 2
    assert values["vllm:request_success_total", "stop"] == 1
    assert values["vllm:generation_tokens_total",] >= 24
    assert values["vllm:inter_token_latency_seconds_count",] >= 22
    assert values["vllm:prefix_cache_hits_total",] > 0
    assert values["vllm:request_queue_time_seconds_count",] == 3
    assert values["autodeploy:http_responses_total", "/v1/completions", "200"] == 3
    assert values["autodeploy:http_responses_total", "unknown", "404"] == 1
