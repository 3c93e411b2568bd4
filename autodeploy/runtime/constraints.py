"""Constraint: which tokens may come next in one request, as bits, ready when they are wanted.

The mask of a token depends on the one before, which the host learns while the next forward runs
(on an accelerator) or shortly before it (on a CPU). A thread takes the tokens from there: it tells
the matchers, and has llguidance compute all masks in parallel, without Python's lock. Whoever
samples waits for it, after the forward is launched.

64 requests with a JSON schema of 30 properties, vocabulary of 4096, one thread: 0.4 ms.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from .grammars import short_reason

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Constraint:
    """Of one request; its mask is that of the tokens told so far."""

    __slots__ = ("error", "matcher", "place", "table")

    def __init__(self, matcher: LLMatcher, place: int, table: MaskTable) -> None:
        self.matcher = matcher
        self.place = place
        self.table = table
        self.error: str | None = None
        """Why the grammar cannot be followed any further: no token is allowed then."""


class MaskTable:
    """The masks of all constrained requests, [places, ceil(vocab / 32)] int32, lowest bit first."""

    def __init__(self, vocab_size: int) -> None:
        from llguidance import LLExecutor

        self._bits = np.zeros((16, -(-vocab_size // 32)), dtype=np.int32)
        self._used: set[int] = set()
        self._executor = LLExecutor(max(1, min(16, (os.cpu_count() or 1) // 2)))
        # One thread: what is told first is done first.
        self._thread = ThreadPoolExecutor(1, "autodeploy-masks")
        self._last: Future[None] | None = None

    def add(self, matcher: LLMatcher) -> Constraint:
        """A constraint for a request without output; its first mask is on the way."""
        place = next(p for p in range(len(self._used) + 1) if p not in self._used)
        self._used.add(place)
        if place >= len(self._bits):
            self._wait()
            self._bits = np.concatenate([self._bits, np.zeros_like(self._bits)])
        constraint = Constraint(matcher, place, self)
        self._last = self._thread.submit(self._compute, [(constraint, None)])
        return constraint

    def remove(self, constraint: Constraint) -> None:
        """Frees its place. What the thread still does for it comes before what it does later."""
        self._used.discard(constraint.place)

    def advance(self, tokens: Sequence[tuple[Constraint, int]]) -> None:
        """Tells each constraint its next token; returns at once."""
        self._last = self._thread.submit(self._compute, tokens)

    def take(self, constraints: Iterable[Constraint]) -> np.ndarray:
        """Their masks, [M, ceil(vocab / 32)] int32, a copy; waits until they are there."""
        self._wait()
        return self._bits[[constraint.place for constraint in constraints]]

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()
            self._last = None

    def _compute(self, tokens: Sequence[tuple[Constraint, int | None]]) -> None:
        told = [(c.matcher, token) for c, token in tokens if token is not None]
        if told:
            self._executor.consume_token_par(told)
        bits = self._bits
        self._executor.unsafe_compute_mask_ptr(
            [(c.matcher, c.place) for c, _ in tokens],
            bits.ctypes.data, bits.strides[0], len(bits),
        )  # fmt: skip
        for constraint, _ in tokens:
            if constraint.matcher.is_error():
                # The library's mask allows the end of the sequence then, as if all were well.
                constraint.error = short_reason(constraint.matcher.get_error())
                bits[constraint.place] = 0
