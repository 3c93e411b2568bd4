"""Which kernel a product of few tokens runs on, and with which tiles: measurements as data."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

GEMV_TOKENS = 2
"""Most tokens `gemv_kernel` holds sums for."""
DOT_TOKENS = 128
"""Most tokens `dot_kernel` is chosen for; above, cuBLAS."""
NORM_TOKENS = 16
"""Most tokens whose norm `dot_kernel` is to apply itself: each program does it for all of x."""
SHARED_BYTES = 224 * 1024
"""Shared memory that the stages of one program may take."""


@dataclass(frozen=True)
class Tiling:
    """One way to run a product.

    block_n counts columns of the result: a gated tile reads twice as many rows of the weight.
    early: bytes of each weight row that a program asks for before it waits for its predecessor.
    split and stages mean something to `dot_kernel` only; so does norms: whether it applies a norm
    itself or finds x normed.
    """

    kernel: Literal["gemv", "dot", "cublas"]
    block_n: int = 0
    block_k: int = 0
    split: int = 1
    stages: int = 4
    warps: int = 4
    norms: bool = True
    early: int = 0


@dataclass(frozen=True)
class Measured:
    """The best tiling found for some products: tokens and sizes from .. to, both included."""

    tokens: tuple[int, int]
    rows: tuple[int, int]
    """Of the weight."""
    width: tuple[int, int]
    """K."""
    tiling: Tiling
    gated: bool | None = None
    """None: for both."""

    def holds(self, tokens: int, rows: int, width: int, gated: bool) -> bool:
        return (
            self.tokens[0] <= tokens <= self.tokens[1]
            and self.rows[0] <= rows <= self.rows[1]
            and self.width[0] <= width <= self.width[1]
            and self.gated in (None, gated)
        )


MEASURED: tuple[Measured, ...] = ()
"""The first that holds is taken; what none holds for gets `_estimated`."""


@functools.cache
def tiling_of(
    tokens: int, rows: int, width: int, gated: bool, multiprocessors: int = 132
) -> Tiling:
    """The tiling of x [tokens, width] times weight [rows, width], for 2-byte numbers."""
    for measured in MEASURED:
        if measured.holds(tokens, rows, width, gated):
            return measured.tiling
    return _estimated(tokens, rows, width, gated, multiprocessors)


def padded(tokens: int) -> int:
    """Tokens as `dot_kernel` pads them: a power of 2 from 16."""
    return max(16, 1 << (tokens - 1).bit_length())


def _estimated(tokens: int, rows: int, width: int, gated: bool, multiprocessors: int) -> Tiling:
    columns = rows // 2 if gated else rows
    if tokens <= GEMV_TOKENS:
        # Six programs a multiprocessor keep enough loads under way, if there are as many.
        block_n = 2 if gated else 4
        while block_n > 1 and columns < 6 * multiprocessors * block_n:
            block_n //= 2
        return Tiling("gemv", block_n, min(1024, 1 << (width - 1).bit_length()))
    if tokens > DOT_TOKENS:
        return Tiling("cublas")
    block_m = padded(tokens)
    # Tall tiles read x less often, wide ones need fewer programs.
    block_n = {16: 32, 32: 64, 64: 64, 128: 128}[block_m] // (2 if gated and block_m < 64 else 1)
    block_k = 256 if block_m == 16 else 128
    return bounded(Tiling("dot", block_n, block_k), tokens, columns, width, gated, multiprocessors)


def bounded(
    tiling: Tiling, tokens: int, columns: int, width: int, gated: bool, multiprocessors: int
) -> Tiling:
    """A tiling for `dot_kernel` with stages that fit and a split that fills the device."""
    block_k = min(tiling.block_k, max(16, 1 << (width - 1).bit_length()))
    stage = 2 * block_k * (tiling.block_n * (2 if gated else 1) + padded(tokens))
    stages = max(1, min(tiling.stages, SHARED_BYTES // stage))
    programs = -(-columns // tiling.block_n)
    split = 1
    while programs * split * 2 <= 2 * multiprocessors and width >= split * 2 * block_k * stages:
        split *= 2
    warps = 8 if tiling.block_n * padded(tokens) * (2 if gated else 1) > 64 * 128 else 4
    norms = tokens <= NORM_TOKENS
    early = 2 * block_k * stages
    return Tiling("dot", tiling.block_n, block_k, split, stages, warps, norms, early)
