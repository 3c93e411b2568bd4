"""Open-loop serving: requests arrive at a rate, whether or not earlier ones are done.

Arrivals are a Poisson process, in process, through AsyncLLM; `remote` measures over HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from ..async_llm import AsyncLLM
from ..llm import LLM
from ..runtime.sampling_params import SamplingParams
from .latencies import Served, arrivals, latency_rows
from .report import Row
from .workload import Workload


def measure(llm: LLM, work: Workload, rate: float, seed: int) -> list[Row]:
    """A row of output tokens/s, and one per latency and percentile.

    rate: requests a second; inf: all at once. `llm` cannot be used afterwards.
    """
    served = asyncio.run(_serve(llm, work, arrivals(len(work.prompts), rate, seed)))
    seconds = max(s.times[-1] for s in served) - min(s.due for s in served)
    made = sum(s.tokens for s in served)
    name = f"serve, {len(served)} requests at {rate:g}/s"
    details: dict[str, Any] = {"seconds": seconds, "rate": f"{rate:g}"}
    row = Row("serve", name, made / seconds, "tok/s", None, details)
    return [row, *latency_rows(served)]


async def _serve(llm: LLM, work: Workload, due: Sequence[float]) -> list[Served]:
    engine = AsyncLLM.from_parts(llm._executor, llm.tokenizer)
    async with engine:
        began = time.perf_counter()
        return await asyncio.gather(*(
            _request(engine, prompt, output, began + at)
            for prompt, output, at in zip(work.prompts, work.outputs, due, strict=True)
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
