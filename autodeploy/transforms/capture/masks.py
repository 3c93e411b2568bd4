"""Proving what an attention mask is, by evaluating the function that makes it.

transformers builds every mask from a function of (batch, head, query index, key index). It is
evaluated on whole rows, on a dense square and on random pairs, up to far beyond any window, and
compared with each kind our attention op can express. A mask that matches none is not assumed to
be causal: it is reported, and the fast path is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import _disable_current_modes

PROBED_LENGTH = 1 << 17
_DENSE = 192
_RANDOM_PAIRS = 100_000

MaskFunction = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Mask:
    """A mask our attention op can express. Zero means no such limit."""

    causal: bool = True
    window: int = 0
    chunk: int = 0

    def visible(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether key positions are visible to query positions; both int64, broadcast."""
        seen = key <= query if self.causal else torch.ones_like(key + query, dtype=torch.bool)
        if self.window:
            seen = seen & (key > query - self.window)
        if self.chunk:
            seen = seen & (key // self.chunk == query // self.chunk)
        return seen


def classify(function: MaskFunction, length: int = PROBED_LENGTH) -> Mask | None:
    """The kind of mask `function(batch, head, query, key)` makes, or None if it is no known one.

    length: positions below it are probed.
    """
    # Under export a tensor made here would be fake; the probe needs real numbers.
    with _disable_current_modes():
        try:
            for candidate in _candidates(function, length):
                if _agrees(function, candidate, length):
                    return candidate
        except (IndexError, RuntimeError):
            # The function indexes a tensor of the input: it depends on more than positions.
            return None
    return None


def _evaluate(function: MaskFunction, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros((), dtype=torch.int64)
    return torch.as_tensor(function(zero, zero, query, key)).expand(
        torch.broadcast_shapes(query.shape, key.shape)
    )


def _candidates(function: MaskFunction, length: int) -> Iterator[Mask]:
    last = torch.tensor(max(length - 65, length // 2))
    row = _evaluate(function, last, torch.arange(length))
    if bool(row.all()):
        yield Mask(causal=False)
        return
    seen = row.nonzero().flatten()
    if not len(seen) or int(seen[-1]) != int(last):
        return
    first = int(seen[0])
    if first == 0:
        yield Mask()
        return
    yield Mask(window=int(last) - first + 1)
    before = _evaluate(function, torch.tensor(first - 1), torch.arange(length)).nonzero().flatten()
    if len(before):
        yield Mask(chunk=first - int(before[0]))


def _agrees(function: MaskFunction, mask: Mask, length: int) -> bool:
    if mask.chunk < 0 or mask.window < 0:
        return False
    square = torch.arange(min(_DENSE, length))
    generator = torch.Generator().manual_seed(0)
    query = torch.randint(length, (_RANDOM_PAIRS,), generator=generator)
    edge = mask.window or mask.chunk or 1
    near = (query + torch.randint(-2, 3, query.shape, generator=generator)).clamp(0, length - 1)
    pairs = [
        (square[:, None], square[None, :]),
        (query, torch.randint(length, query.shape, generator=generator)),
        (query, near),
        (query, (near - edge).clamp(0)),
        (query, (query // edge * edge - 1 + (near - query)).clamp(0)),
    ]
    return all(
        torch.equal(
            _evaluate(function, q, k), mask.visible(q, k).expand(_evaluate(function, q, k).shape)
        )
        for q, k in pairs
    )
