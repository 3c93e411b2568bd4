"""When outputs came, and the latencies that this makes.

Times count from when a request was due, not from when somebody got to it. TTFT: to the first token.
TPOT: from the first token to the last, per further token, one figure a request. ITL: between one
output and the next, one figure an output. E2E: to the last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from .report import Row

PERCENTILES = (50, 90, 99)


@dataclass
class Served:
    """When a request was due and when its outputs came, on `time.perf_counter`."""

    due: float
    tokens: int = 0
    times: list[float] = field(default_factory=list)
    """Over HTTP: of reads that brought output, however many events each of them had."""
    events: int = 0
    """Over HTTP: events with output."""


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seconds from the start, the first request at 0; gaps are exponential. rate: a second."""
    source = Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += source.expovariate(rate) if rate != float("inf") else 0.0
    return times


def latency_rows(served: Sequence[Served]) -> list[Row]:
    """A row per latency and percentile."""
    rows = []
    for metric, values in _latencies(served).items():
        if not values:
            continue
        points = [1000 * float(np.percentile(values, p)) for p in PERCENTILES]
        rows += [
            Row("serve", f"{metric} p{p}", point, "ms")
            for p, point in zip(PERCENTILES, points, strict=True)
        ]
    return rows


def _latencies(served: Sequence[Served]) -> dict[str, list[Any]]:
    return {
        "TTFT": [s.times[0] - s.due for s in served],
        "TPOT": [(s.times[-1] - s.times[0]) / (s.tokens - 1) for s in served if s.tokens > 1],
        "ITL": [b - a for s in served for a, b in zip(s.times, s.times[1:], strict=False)],
        "E2E": [s.times[-1] - s.due for s in served],
    }
