"""ServerMetrics: what Prometheus scrapes from one server: its engine's counters, and its requests'.

Nothing is global: every server has its own, so that several can live in one process. Requests are
watched on the event loop, and a scrape is answered there, so no counter needs a lock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Protocol

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..runtime.messages import EngineStats
from .engine_metrics import engine_families
from .histogram import COUNTS, SECONDS, TOKEN_SECONDS, Histogram, token_counts

FINISHED_REASONS = ("stop", "length", "abort", "error")


class Served(Protocol):
    """What is served; `AsyncLLM` is one."""

    stats: EngineStats

    @property
    def open_requests(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...


class ServerMetrics(Collector):
    """The metrics of one server; `docs/observability.md` has the list.

    llm: gives what is served now, which a restart may change. Its histograms' edges are those of
    the model's longest sequence.
    model_name: the label `model_name` of every metric, and `engine` is '0', as vLLM has them.
    """

    def __init__(self, llm: Callable[[], Served], model_name: str) -> None:
        self._llm = llm
        self.labels = {"model_name": model_name, "engine": "0"}
        self.finished: Counter[str] = Counter(dict.fromkeys(FINISHED_REASONS, 0))
        self.refused = 0
        self.prompt_tokens = 0
        self.responses: Counter[tuple[str, str]] = Counter()
        """HTTP responses by route and status."""
        tokens = token_counts(llm().max_model_len)
        self.request_prompt_tokens = Histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a finished request.", tokens
        )
        self.request_generation_tokens = Histogram(
            "vllm:request_generation_tokens", "Output tokens of a finished request.", tokens
        )
        self.params_n = Histogram(
            "vllm:request_params_n", "The parameter n of a finished request.", COUNTS
        )
        self.params_max_tokens = Histogram(
            "vllm:request_params_max_tokens",
            "The parameter max_tokens of a finished request that had one.", tokens,
        )  # fmt: skip
        self.first_token = Histogram(
            "vllm:time_to_first_token_seconds",
            "From a request's arrival to its first token, at the server.", SECONDS,
        )  # fmt: skip
        self.inter_token = Histogram(
            "vllm:inter_token_latency_seconds",
            "Between two tokens of a sequence, at the server; of a request that is not streamed, "
            "its mean, once per token.", TOKEN_SECONDS,
        )  # fmt: skip
        self.per_output_token = Histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time between the tokens of a finished request, in the engine.", TOKEN_SECONDS,
        )  # fmt: skip
        self.end_to_end = Histogram(
            "vllm:e2e_request_latency_seconds",
            "From a request's arrival to its end, at the server.", SECONDS,
        )  # fmt: skip
        self.queue = Histogram(
            "vllm:request_queue_time_seconds",
            "From a request's arrival to the first step that computes some of it.", SECONDS,
        )  # fmt: skip
        self.prefill = Histogram(
            "vllm:request_prefill_time_seconds",
            "From the first step that computes some of a request to its first token.", SECONDS,
        )  # fmt: skip
        self.decode = Histogram(
            "vllm:request_decode_time_seconds",
            "From a request's first token to its last.", SECONDS,
        )  # fmt: skip
        self.inference = Histogram(
            "vllm:request_inference_time_seconds",
            "From the first step that computes some of a request to its last token.", SECONDS,
        )  # fmt: skip
        self._histograms = [v for v in vars(self).values() if isinstance(v, Histogram)]
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """All families, for prometheus_client."""
        llm = self._llm()
        yield from engine_families(llm.stats, self.labels)
        names, values = list(self.labels), list(self.labels.values())
        opened = GaugeMetricFamily(
            "autodeploy:open_requests", "Requests that the server has not answered yet.",
            labels=names,
        )  # fmt: skip
        opened.add_metric(values, llm.open_requests)
        yield opened
        prompts = CounterMetricFamily(
            "vllm:prompt_tokens",
            "Prompt tokens of requests that got a first token, cached ones among them.",
            labels=names,
        )
        prompts.add_metric(values, self.prompt_tokens)
        yield prompts
        refused = CounterMetricFamily(
            "autodeploy:requests_refused",
            "Requests that were refused as written, before they reached the engine.",
            labels=names,
        )
        refused.add_metric(values, self.refused)
        yield refused
        finished = CounterMetricFamily(
            "vllm:request_success", "Requests that ended, by the reason of their first sequence.",
            labels=[*names, "finished_reason"],
        )  # fmt: skip
        for reason, count in self.finished.items():
            finished.add_metric([*values, reason], count)
        yield finished
        responses = CounterMetricFamily(
            "autodeploy:http_responses", "HTTP responses by route and status.",
            labels=["route", "status"],
        )  # fmt: skip
        for key, count in self.responses.items():
            responses.add_metric(key, count)
        yield responses
        for histogram in self._histograms:
            yield histogram.family(self.labels)

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self._registry)

    def router(self) -> APIRouter:
        """GET /metrics, in the format that the scraper asks for."""
        router = APIRouter()

        # On the event loop, where requests are watched: no counter changes while it is read.
        @router.get("/metrics", include_in_schema=False)
        async def metrics(request: Request) -> Response:
            encode, media_type = choose_encoder(request.headers.get("accept", ""))
            return Response(encode(self._registry), headers={"Content-Type": media_type})

        return router
