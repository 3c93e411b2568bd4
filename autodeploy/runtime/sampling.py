"""Sampling: tokens that are chosen on the device and may still be on their way to the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from .messages import TokenLogprob

FORBIDDEN = (
    "every token is forbidden: allowed_token_ids, structured_outputs, bad words and min_tokens "
    "leave none; relax one of them"
)
BROKEN = "the model's logits are NaN, +inf or all -inf; look for overflow in its computation"


@dataclass(frozen=True)
class SampleResult:
    """What one step sampled, in the order of the `rows` asked for."""

    token_ids: np.ndarray
    """[N] int64; -1 where nothing could be sampled."""
    logprobs: list[list[TokenLogprob] | None]
    """The sampled token first, then the top candidates; None for rows that did not ask."""
    bad_rows: list[int] = field(default_factory=list)
    """Rows (not positions) for which nothing could be sampled."""
    reasons: dict[int, str] = field(default_factory=dict)
    """A sentence for each bad row."""
    vectors: list[bytes] | None = None
    """In the place of tokens: a pooled state each (`pooler`)."""


def best_result(token_ids: np.ndarray, rows: np.ndarray) -> SampleResult:
    """Of greedy rows that ask for nothing else; both [N] int64."""
    bad = rows[token_ids < 0].tolist()
    return SampleResult(token_ids, [None] * len(rows), bad, dict.fromkeys(bad, BROKEN))


class Sampling:
    """One step's tokens.

    Args:
        tokens: see below.
        collect: makes the result, when it is there; called once at most.
        wait: until it is there; None if it is.
    """

    def __init__(
        self,
        tokens: Tensor | None,
        collect: Callable[[], SampleResult],
        wait: Callable[[], None] | None = None,
    ) -> None:
        self.tokens = tokens
        """[N] int64 on the device of the logits, -1 where nothing could be sampled: for work that
        is launched later on the same stream. None where that has them already."""
        self._collect: Callable[[], SampleResult] | None = collect
        self._wait = wait
        self._result: SampleResult | None = None

    def wait(self) -> None:
        """Until the tokens are on the host."""
        if self._wait is not None:
            self._wait()
            self._wait = None

    def result(self) -> SampleResult:
        """The tokens on the host. Waits for the device the first time."""
        if self._collect is not None:
            self.wait()
            self._result = self._collect()
            self._collect = None
        assert self._result is not None
        return self._result
