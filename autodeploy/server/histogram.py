"""Histogram: a Prometheus histogram that one thread fills, made for one call a token.

prometheus_client's takes a lock and walks its buckets; at 20,000 tokens a second that is a
noticeable part of a core. This one is a bisection and two additions, and takes a weight, because
several tokens may arrive at once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from prometheus_client.metrics_core import HistogramMetricFamily

SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0,
    7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
"""Of requests and their phases: from a warm prefix on a small model to hours in a queue."""
TOKEN_SECONDS = (
    0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04,
    0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0,
)  # fmt: skip
"""Between tokens."""
COUNTS = (1, 2, 5, 10, 20)


def token_counts(largest: int) -> list[float]:
    """1, 2, 5, 10, ... up to the first that is not below `largest`."""
    edges: list[float] = []
    power = 1
    while not edges or edges[-1] < largest:
        edges += [float(power * digit) for digit in (1, 2, 5)]
        power *= 10
    return [e for i, e in enumerate(edges) if i == 0 or edges[i - 1] < largest]


class Histogram:
    """Counts of values by upper edge, and their sum. Not for several threads at once."""

    def __init__(self, name: str, text: str, edges: Sequence[float]) -> None:
        self.name = name
        self._text = text
        self._edges = list(edges)
        self._counts = [0] * (len(self._edges) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Counts a value, `times` times. Hot: once per token streamed (0.2 µs)."""
        self._counts[bisect_left(self._edges, value)] += times
        self._sum += value * times

    def family(self, labels: Sequence[str]) -> HistogramMetricFamily:
        """As prometheus_client exposes it, still empty. labels: names."""
        return HistogramMetricFamily(self.name, self._text, labels=labels)

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Adds what was counted to its own family, or an equal one's. labels: values."""
        buckets, total = [], 0
        for edge, count in zip([*self._edges, float("inf")], self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if edge == float("inf") else repr(float(edge)), total))
        family.add_metric(labels, buckets, self._sum)
