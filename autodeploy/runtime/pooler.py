"""Pooler: in the place of a sampler, it makes one vector of the rows of each prompt.

A prompt may come in several steps. Its last row is what a token would be sampled of; the rows
before it are those that its logprobs would be made of, and come only where their mean is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from autodeploy.errors import InvalidRequestError

from .messages import EngineRequest, TokenLogprob
from .sampling import SampleResult, Sampling

_BROKEN = "the model's hidden states are not numbers; look for overflow in its computation"


class Pooler:
    """Rows are the engine's numbers of requests, as a sampler's are."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[Tensor, int]] = {}
        """Of those that want a mean: the sum [hidden] float32 of rows so far, and how many."""

    def add(self, row: int, request: EngineRequest, matcher: object = None) -> None:
        """A request begins."""
        if request.pooling not in ("last", "mean"):
            raise InvalidRequestError(f"pooling must be last or mean, not {request.pooling!r}")
        if request.pooling == "mean":
            self._sums[row] = torch.zeros(()), 0

    def remove(self, row: int) -> None:
        """It is over."""
        self._sums.pop(row, None)

    def extend(self, rows: np.ndarray, token_ids: np.ndarray) -> None:
        """Nothing: what comes after a prompt does not matter."""

    def takes_best(self, rows: np.ndarray) -> bool:
        return False

    def prompt_logprobs(
        self, logits: Tensor, next_token_ids: Sequence[int], k: int
    ) -> list[list[TokenLogprob]]:
        raise TypeError("hidden states have no log probabilities")

    def take_in(self, row: int, hidden: Tensor) -> None:
        """Rows [count, hidden] of a prompt, the last one not among them."""
        total, count = self._sums[row]
        self._sums[row] = total.to(hidden.device) + hidden.float().sum(0), count + len(hidden)

    def launch(self, hidden: Tensor, rows: np.ndarray) -> Sampling:
        """The vectors of prompts that are complete; hidden [N, hidden] are their last rows."""
        vectors = hidden.to(torch.float32, copy=True)
        for at, row in enumerate(rows.tolist()):
            if row in self._sums:
                total, count = self._sums[row]
                vectors[at] = (total.to(vectors.device) + vectors[at]) / (count + 1)

        def collect() -> SampleResult:
            found = vectors.cpu().numpy().astype("<f4")
            good = np.isfinite(found).all(1)
            bad = rows[~good].tolist()
            return SampleResult(
                np.where(good, 0, -1),
                [None] * len(rows),
                bad,
                dict.fromkeys(bad, _BROKEN),
                [vector.tobytes() for vector in found],
            )

        return Sampling(torch.zeros(len(rows), dtype=torch.int64, device=hidden.device), collect)
