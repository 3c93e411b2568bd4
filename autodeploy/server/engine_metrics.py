"""What an engine counts itself, as Prometheus metrics: one table, read when somebody scrapes.

The engine's counters start again with a new engine, which Prometheus knows how to read. Metrics
that mean what vLLM's mean have vLLM's names, `vllm:` and all, so that dashboards, alerts and
autoscalers made for it work unchanged; what only we have begins with `autodeploy:`. There is no
option: a metric that may have two names is one that nobody's query finds.
Source of the names: https://docs.vllm.ai/en/latest/usage/metrics.html (2026).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..runtime.messages import EngineStats

ENGINE_LABELS = ("model_name", "engine")
"""Labels of everything that one engine did; `engine` is its number among the replicas, from 0."""


@dataclass(frozen=True)
class EngineMetric:
    """One metric that is a function of the engine's last report."""

    name: str
    """Without the `_total` that Prometheus adds to a counter."""
    kind: Literal["gauge", "counter"]
    text: str
    value: Callable[[EngineStats], float]


def kv_usage(stats: EngineStats) -> float:
    """Share of the KV pages that requests hold, 0 to 1; 0 for a model without pages."""
    return stats.pages_used / stats.pages_total if stats.pages_total else 0.0


ENGINE_METRICS = (
    EngineMetric(
        "vllm:num_requests_running", "gauge", "Sequences in the engine's batch.",
        lambda s: s.running,
    ),
    EngineMetric(
        "vllm:num_requests_waiting", "gauge", "Sequences in the engine's queue.",
        lambda s: s.waiting,
    ),
    EngineMetric(
        "vllm:kv_cache_usage_perc", "gauge",
        "Share of the KV pages that requests hold, 0 to 1.", kv_usage,
    ),
    EngineMetric(
        "vllm:prefix_cache_queries", "counter", "Prompt tokens looked up in the prefix cache.",
        lambda s: s.prefix_queries,
    ),
    EngineMetric(
        "vllm:prefix_cache_hits", "counter", "Prompt tokens found in the prefix cache.",
        lambda s: s.prefix_hits,
    ),
    EngineMetric(
        "vllm:num_preemptions", "counter",
        "Sequences put back into the queue because pages ran out.", lambda s: s.preemptions,
    ),
    EngineMetric(
        "vllm:generation_tokens", "counter", "Tokens generated.", lambda s: s.generated_tokens
    ),
    EngineMetric(
        "autodeploy:kv_pages", "gauge", "KV pages of the engine, of all groups together.",
        lambda s: s.pages_total,
    ),
    EngineMetric(
        "autodeploy:engine_steps", "counter", "Steps of the engine that computed something.",
        lambda s: s.step,
    ),
    EngineMetric(
        "autodeploy:step_seconds", "gauge", "Seconds that the host spent on the last step.",
        lambda s: s.step_seconds,
    ),
    EngineMetric(
        "autodeploy:device_wait_seconds", "counter",
        "Seconds that the host did nothing but wait for the device.",
        lambda s: s.waited_seconds,
    ),
    EngineMetric(
        "autodeploy:aborts", "counter",
        "Sequences that the engine was told to end: clients that left, stop strings.",
        lambda s: s.aborted,
    ),
    EngineMetric(
        "autodeploy:graph_replays", "counter",
        "Decoding steps that were one launch of a CUDA graph.", lambda s: s.graph_replays,
    ),
    EngineMetric(
        "autodeploy:graph_misses", "counter",
        "Decoding steps for whose number of sequences no CUDA graph was captured.",
        lambda s: s.graph_misses,
    ),
    EngineMetric(
        "autodeploy:mixed_graph_replays", "counter",
        "Steps with prompt tokens that were one launch of a CUDA graph.",
        lambda s: s.mixed_replays,
    ),
    EngineMetric(
        "autodeploy:mixed_steps_without_graph", "counter",
        "On a GPU: steps with prompt tokens that ran without a CUDA graph.",
        lambda s: s.mixed_steps,
    ),
)  # fmt: skip


def engine_families(model_name: str, reports: Sequence[EngineStats]) -> Iterator[Metric]:
    """All of `ENGINE_METRICS`. reports: of engines 0, 1, ..."""
    for metric in ENGINE_METRICS:
        kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
        family = kind(metric.name, metric.text, labels=ENGINE_LABELS)
        for engine, stats in enumerate(reports):
            family.add_metric([model_name, str(engine)], metric.value(stats))
        yield family
