"""Prompt tokens per second: equal random prompts, one output token each, no prefix cache."""

from __future__ import annotations

import statistics
import time
from random import Random

from ..llm import LLM
from ..runtime.sampling_params import SamplingParams
from ..transforms.cost import prefill_floor_seconds
from .report import Roof, Row


def measure(llm: LLM, roof: Roof, requests: int, length: int, repeat: int) -> Row:
    """The median of `repeat` runs of requests x length tokens, each with prompts of its own."""
    seconds = [_run(llm, requests, length, seed) for seed in range(repeat)]
    tokens = requests * length
    floor = roof.floor(lambda c, p: tokens / prefill_floor_seconds(c, [length] * requests, p))
    return Row(
        "prefill", f"prefill, {requests} x {length}", tokens / statistics.median(seconds), "tok/s",
        floor, {"runs": [tokens / s for s in seconds]},
    )  # fmt: skip


def _run(llm: LLM, requests: int, length: int, seed: int) -> float:
    source = Random(seed)
    prompts = [[source.randrange(llm.vocab_size) for _ in range(length)] for _ in range(requests)]
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    started = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - started
