"""ServerMetrics: what Prometheus scrapes from one server: its engines' counters, and its requests'.

Nothing is global: every server has its own, so that several can live in one process. Requests are
watched on the event loop, and a scrape is answered there, so no counter needs a lock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..runtime.messages import EngineStats
from .engine_metrics import ENGINE_LABELS, engine_families
from .request_counts import RequestCounts


class Served(Protocol):
    """What is served; `AsyncLLM` is one."""

    stats: EngineStats

    @property
    def open_requests(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...


class ServerMetrics(Collector):
    """The metrics of one server; `docs/observability.md` has the list.

    llms: gives the engines that serve now, which restarts may change but for their number.
    model_name: the label `model_name`; the label `engine` is an engine's number, as vLLM has them.
    """

    def __init__(self, llms: Callable[[], Sequence[Served]], model_name: str) -> None:
        self._llms = llms
        self.model_name = model_name
        self.requests = [RequestCounts(llm.max_model_len) for llm in llms()]
        """By engine."""
        self.responses: Counter[tuple[str, str]] = Counter()
        """HTTP responses by route and status."""
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """All families, for prometheus_client."""
        llms = self._llms()
        yield from engine_families(self.model_name, [llm.stats for llm in llms])
        opened = GaugeMetricFamily(
            "autodeploy:open_requests", "Requests that the server has not answered yet.",
            labels=ENGINE_LABELS,
        )  # fmt: skip
        for labels, llm in zip(self._labels(), llms, strict=True):
            opened.add_metric(labels, llm.open_requests)
        yield opened
        yield from self._of_requests()
        responses = CounterMetricFamily(
            "autodeploy:http_responses", "HTTP responses by route and status.",
            labels=["route", "status"],
        )  # fmt: skip
        for key, count in self.responses.items():
            responses.add_metric(key, count)
        yield responses

    def _labels(self) -> list[list[str]]:
        return [[self.model_name, str(engine)] for engine in range(len(self.requests))]

    def _of_requests(self) -> Iterator[Metric]:
        prompts = CounterMetricFamily(
            "vllm:prompt_tokens",
            "Prompt tokens of requests that got a first token, cached ones among them.",
            labels=ENGINE_LABELS,
        )
        refused = CounterMetricFamily(
            "autodeploy:requests_refused",
            "Requests that were refused as written, before they reached the engine.",
            labels=ENGINE_LABELS,
        )
        finished = CounterMetricFamily(
            "vllm:request_success", "Requests that ended, by the reason of their first sequence.",
            labels=[*ENGINE_LABELS, "finished_reason"],
        )  # fmt: skip
        histograms = [h.family(ENGINE_LABELS) for h in self.requests[0].histograms]
        for labels, counts in zip(self._labels(), self.requests, strict=True):
            prompts.add_metric(labels, counts.prompt_tokens)
            refused.add_metric(labels, counts.refused)
            for reason, count in counts.finished.items():
                finished.add_metric([*labels, reason], count)
            for family, histogram in zip(histograms, counts.histograms, strict=True):
                histogram.add_to(family, labels)
        yield from (prompts, refused, finished, *histograms)

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
