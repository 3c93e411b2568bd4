"""Milliseconds per decode step: a batch of equal requests, timed while all of them decode.

The batch is submitted at once through `LLM.generate`. Tokens are timed as the engine hands them
over. Timed is the span from the moment at which every request has its first token, so that all
prefill is over, to the moment at which the first request ends; the step is that span divided by
the tokens that came in it, per request. Requests that were prefilled first decode meanwhile, so
outputs are longer by the steps that prefill takes, and the length reported is the mean number of
tokens known, over the span and the requests.

The host's own time of a step is what is left of it without that in which the engine waited for the
device. As long as it is shorter than the device's it costs nothing. Given is that of the step in
the middle, and that which one step in ten exceeds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any

from ..errors import EngineError
from ..llm import LLM
from ..runtime.messages import EngineEvent, EngineStats, TokenBatch, TokenOutput
from ..runtime.sampling_params import SamplingParams
from ..transforms.cost import floor_seconds
from .profile import StepProfile
from .report import Roof, Row


@dataclass(frozen=True)
class Steady:
    """A span in which every request of a batch was decoding."""

    seconds: float
    steps: float
    kv: float
    """Mean tokens known of a sequence, the new one included."""
    host: tuple[float, ...] = ()
    """Microseconds of each step that the host is busy, the front included if it is in process."""

    @property
    def host_us(self) -> float:
        """Of the step in the middle: one in sixteen also fills pages, the first ones settle."""
        return statistics.median(self.host)

    @property
    def host_us_p90(self) -> float:
        return sorted(self.host)[int(0.9 * len(self.host))]

    @property
    def milliseconds(self) -> float:
        return 1000 * self.seconds / self.steps


class Recorder:
    """An executor that notes when tokens come, around the one that makes them.

    on_step: called after each step of the steady span, the first one's start included.
    """

    def __init__(self, executor: Any, batch: int, on_step: Callable[[], None] | None) -> None:
        self._executor = executor
        self._batch = batch
        self._on_step = on_step
        self._begun: set[str] = set()
        self._tokens = 0
        self._over = False
        self._waited = 0.0
        self._span: list[tuple[float, int, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def poll(self, timeout: float) -> list[EngineEvent]:
        events: list[EngineEvent] = self._executor.poll(timeout)
        now = time.perf_counter()
        if not self._over and self._count(events) and len(self._begun) == self._batch:
            self._span.append((now, self._tokens, self._waited))
            if self._on_step is not None:
                self._on_step()
        return events

    def _count(self, events: list[EngineEvent]) -> bool:
        """Notes who has begun and whether one has ended; returns whether tokens came."""
        before = self._tokens
        for event in events:
            if isinstance(event, EngineStats):
                self._waited = event.waited_seconds
            if not isinstance(event, (TokenOutput, TokenBatch)):
                continue
            self._tokens += len(event.token_ids)
            if isinstance(event, TokenOutput):
                self._begun.add(event.request_id)
                self._over = self._over or event.finish_reason is not None
            elif len(self._begun) < self._batch:
                # Only until all have begun: it would cost as much as the step's own front does.
                self._begun.update(event.request_ids)
        return self._tokens > before

    def steady(self, prompt: int) -> Steady:
        """The span, for prompts of `prompt` tokens.

        Raises:
            EngineError: there was none: requests ended before the last one began.
        """
        if len(self._span) < 2:
            raise EngineError(
                f"no step had all {self._batch} requests decoding; ask for more --steps, or for "
                "a --max-num-seqs and a cache that hold the batch"
            )
        (start, before, _), (end, after, _) = self._span[0], self._span[-1]
        steps = (after - before) / self._batch
        kv = prompt + (before + after) / 2 / self._batch - 0.5
        return Steady(end - start, steps, kv, self._host())

    def _host(self) -> tuple[float, ...]:
        return tuple(
            1e6 * ((now - then) - (waited - waited_then))
            for (then, _, waited_then), (now, _, waited) in pairwise(self._span)
        )


def decode(
    llm: LLM, batch: int, kv: int, steps: int, budget: int,
    on_step: Callable[[], None] | None = None,
) -> Steady:  # fmt: skip
    """One batch of random prompts, decoded until about `steps` steady steps are done.

    kv: about the mean length in the steady span. budget: tokens a step takes, for prefill.
    """
    prompt = max(1, kv - steps // 2)
    stagger = 0 if batch * prompt <= budget else -(-batch * prompt // max(1, budget - batch))
    prompt = max(1, prompt - stagger // 2)
    source = Random(batch)
    prompts = [[source.randrange(llm.vocab_size) for _ in range(prompt)] for _ in range(batch)]
    params = SamplingParams(temperature=0.0, max_tokens=steps + stagger + 1, ignore_eos=True)
    with _recorded(llm, batch, on_step) as recorder:
        llm.generate(prompts, params, use_tqdm=False)
    return recorder.steady(prompt)


def measure(
    llm: LLM, roof: Roof, batches: list[int], kv: int, steps: int, budget: int, repeat: int,
    profile: StepProfile | None = None,
) -> Iterator[Row]:  # fmt: skip
    """A row per batch size: the median of `repeat` runs; profiled in one more run, if asked."""
    for batch in batches:
        runs = [decode(llm, batch, kv, steps, budget) for _ in range(repeat)]
        value = statistics.median(run.milliseconds for run in runs)
        mean_kv = statistics.fmean(run.kv for run in runs)
        floor = roof.floor(lambda c, p, b=batch, n=mean_kv: 1000 * floor_seconds(c, b, n, p))  # type: ignore[misc]
        details: dict[str, Any] = {
            "batch": batch, "kv": mean_kv, "runs": [run.milliseconds for run in runs],
            "host_us": statistics.median(run.host_us for run in runs),
            "host_us_p90": statistics.median(run.host_us_p90 for run in runs),
        }  # fmt: skip
        if profile is not None:
            with profile.of(f"batch {batch}") as on_step:
                decode(llm, batch, kv, max(steps, profile.wanted), budget, on_step)
            details["profile"] = profile.figures
        name = f"decode, batch {batch}, kv {mean_kv:.0f}"
        yield Row("latency", name, value, "ms", floor, details)


@contextmanager
def _recorded(llm: LLM, batch: int, on_step: Callable[[], None] | None) -> Iterator[Recorder]:
    executor = llm._executor
    recorder = Recorder(executor, batch, on_step)
    llm._executor = recorder
    try:
        yield recorder
    finally:
        llm._executor = executor
