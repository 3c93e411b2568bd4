"""Open-loop serving: requests arrive at a rate, whether or not earlier ones are done.

Arrivals are a Poisson process, in process, through AsyncLLM. Times count from when a request was
due, not from when the loop got to it. TTFT: to the first token. TPOT: from the first token to the
last, per further token, one figure a request. ITL: between one output and the next, one figure an
output. E2E: to the last token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from ..async_llm import AsyncLLM
from ..llm import LLM
from ..runtime.sampling_params import SamplingParams
from .report import Row
from .workload import Workload

PERCENTILES = (50, 90, 99)


@dataclass
class Served:
    """When a request was due and when its outputs came, on `time.perf_counter`."""

    due: float
    tokens: int = 0
    times: list[float] = field(default_factory=list)


def measure(llm: LLM, work: Workload, rate: float, seed: int) -> list[Row]:
    """A row of output tokens/s, and one per latency and percentile.

    rate: requests a second; inf: all at once. `llm` cannot be used afterwards.
    """
    served = asyncio.run(_serve(llm, work, _arrivals(len(work.prompts), rate, seed)))
    seconds = max(s.times[-1] for s in served) - min(s.due for s in served)
    made = sum(s.tokens for s in served)
    name = f"serve, {len(served)} requests at {rate:g}/s"
    details: dict[str, Any] = {"seconds": seconds, "rate": f"{rate:g}"}
    rows = [Row("serve", name, made / seconds, "tok/s", None, details)]
    for metric, values in _latencies(served).items():
        if not values:
            continue
        points = [1000 * float(np.percentile(values, p)) for p in PERCENTILES]
        rows += [
            Row("serve", f"{metric} p{p}", point, "ms")
            for p, point in zip(PERCENTILES, points, strict=True)
        ]
    return rows


def _arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seconds from the start, the first request at 0."""
    source = Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += source.expovariate(rate) if rate != float("inf") else 0.0
    return times


async def _serve(llm: LLM, work: Workload, arrivals: Sequence[float]) -> list[Served]:
    engine = AsyncLLM.from_parts(llm._executor, llm.tokenizer)
    async with engine:
        began = time.perf_counter()
        return await asyncio.gather(*(
            _request(engine, prompt, output, began + at)
            for prompt, output, at in zip(work.prompts, work.outputs, arrivals, strict=True)
        ))  # fmt: skip


async def _request(engine: AsyncLLM, prompt: list[int], output: int, due: float) -> Served:
    await asyncio.sleep(due - time.perf_counter())
    served = Served(due)
    params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    async for delta in engine.generate(prompt, params):
        new = len(delta.outputs[0].token_ids)
        if new:
            served.tokens += new
            served.times.append(time.perf_counter())
    return served


def _latencies(served: Sequence[Served]) -> dict[str, list[Any]]:
    return {
        "TTFT": [s.times[0] - s.due for s in served],
        "TPOT": [(s.times[-1] - s.times[0]) / (s.tokens - 1) for s in served if s.tokens > 1],
        "ITL": [b - a for s in served for a, b in zip(s.times, s.times[1:], strict=False)],
        "E2E": [s.times[-1] - s.due for s in served],
    }
