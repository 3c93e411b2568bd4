"""Which kernel a product of few tokens runs on, and with which tiles, by what was measured."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

GEMV_TOKENS = 1
"""Most tokens `gemv_kernel` is chosen for; it holds sums for 2."""
DOT_TOKENS = 64
"""Most tokens `dot_kernel` is chosen for; above, cuBLAS."""
AHEAD_TOKENS, AHEAD_WIDTH = 32, 2048
"""Most tokens whose rows are scaled ahead of a norm; of rows as wide as this up to DOT_TOKENS."""
SQUARE_COLUMNS = 64
"""Columns of which `dot_kernel` leaves one sum of squares for the next norm, or a multiple."""
HEAD_ROWS = 65536
"""From this many rows on cuBLAS reads a weight as fast as it can be read."""
NARROW_TOKENS = 64
"""Most tokens that a small weight's product runs on `dot_kernel` for."""
NARROW_BYTES = 16384
"""Bytes of a small weight, for each multiprocessor."""
NARROW_ROWS, NARROW_SPLIT = 16, 8
"""Rows of a tile of a small weight, and the most parts of a row."""
WIDE_SPARE = 16
"""Most tokens that a tile of `wide_kernel` may lack."""
MANY_TOKENS = 2048
"""From this many tokens on a gated product of narrow rows runs on `wide_kernel`."""
MOST_PARTS, MOST_WIDE_PARTS = 32, 4
"""Most parts of a split product, of up to 32 tokens and of more."""
WHOLE_BYTES = 192 * 1024
"""What a tile may read at most, of the weight and of x, to be left whole. In us a layer of a chain
of products on an H200, 4096 x 1024 of it whole and in two parts: 16 tokens 20.2 and 20.8, 64 tokens
25.7 and 25.1."""
SMALL_BYTES = 192 * 1024
"""Bytes of a weight that counts as small for one token, for each multiprocessor."""
SHARED_BYTES = 224 * 1024
"""Shared memory that the stages of one program may take, or of those in one multiprocessor."""


@dataclass(frozen=True)
class Tiling:
    """One way to run a product.

    block_n counts columns of the result: a gated tile reads twice as many rows of the weight.
    early: bytes of each weight row that a program asks for before it waits for its predecessor.
    split means something to `dot_kernel` only. block_m: tokens of a tile, for `dot_kernel` 0 if
    all. The last two mean something to `wide_kernel` only: programs that tiles are dealt to (0: one
    for each), and token tiles that are worked on side by side.
    """

    kernel: Literal["gemv", "dot", "wide", "cublas"]
    block_n: int = 0
    block_k: int = 0
    split: int = 1
    stages: int = 4
    warps: int = 4
    early: int = 0
    block_m: int = 0
    programs: int = 0
    group: int = 8


@functools.cache
def tiling_of(
    tokens: int,
    rows: int,
    width: int,
    gated: bool,
    multiprocessors: int = 132,
    ends: bool = True,
    norm: bool = False,
) -> Tiling:
    """The tiling of x [tokens, width] times weight [rows, width], for 2-byte numbers.

    ends: whether a gate, an activation or a residual follows. norm: whether a norm comes first.

    What was fastest on an H200 for products with 2048 to 28672 rows and 2048 to 14336 columns.

    In us, beside cuBLAS with its norm, gate or residual apart: one token, a norm and 6144 x 4096:
    15.2 and 17.1; 4096 x 14336 and a residual: 28.9 and 33.5. Eight tokens, 2048 x 8192 and a
    residual: 12.1 and 15.4; 16384 x 2048 and a gate: 19.3 and 21.5. A product alone is as fast in
    cuBLAS from two tokens on, and so is every product of more than 64, but for gated ones (see
    `_wide`).
    """
    columns = rows // 2 if gated else rows
    if tokens <= GEMV_TOKENS:
        return _single(rows, width, gated, multiprocessors)
    most = DOT_TOKENS if ends or norm else 0
    if tokens > most or rows >= HEAD_ROWS:
        return _wide(tokens, columns, width, multiprocessors) if gated else Tiling("cublas")
    shape = (tokens, columns, width, gated, multiprocessors)
    if gated:
        # Tiles for more than all multiprocessors: 2 x 10240 x 2560 31 us, in larger steps 40.
        if tokens > 16 and -(-columns // 64) <= multiprocessors:
            return filled(128, *shape)
        return bounded(Tiling("dot", 64, 64 if tokens > 32 else 128), *shape)
    if tokens > 32 and ends:
        return bounded(Tiling("dot", 64, 128), *shape)
    return filled(128 if tokens <= 32 else 64, *shape)


def _single(rows: int, width: int, gated: bool, multiprocessors: int) -> Tiling:
    """Of one token: 8192 numbers of the weight a program.

    Rows are held whole if they have at most 2048 columns, or up to 4096 where steps of 1024 would
    leave a rest: all of a program's bytes are asked for at once, and the columns past the end are
    no bytes. Longer ones go in steps of 1024, but of 2048 where the weight is small. In us on an
    H200, steps of 2048 and of 1024: 2048 x 4096 3.8 and 4.4, 6144 x 4096 17.6 and 16.1; 2 x 10240
    gated rows of 2560, whole: 4.2 less. Two rows of 5120 or 10240 a program, not one: 2.2 and 3.3.
    """
    power = _power(width)
    if not gated:
        block_n = 1 << (max(1, 8192 // width).bit_length() - 1)
        if power <= 2048:
            return Tiling("gemv", block_n, power)
        if power <= 4096 and width % 1024:
            return Tiling("gemv", block_n, power, warps=2)
        if 4096 < width <= 10240:
            return Tiling("gemv", 2, 1024)
        small = 2 * rows * width <= SMALL_BYTES * multiprocessors
        return Tiling("gemv", block_n, 2048 if small and block_n > 1 else 1024)
    # Rows whole where they are short, and of long ones two at a time.
    if width <= 2048:
        return Tiling("gemv", max(1, 4096 // power), power, warps=4 if width > 1024 else 2)
    if power <= 4096 and width % 1024:
        return Tiling("gemv", 1, power, warps=2)
    return Tiling("gemv", 2, 1024, warps=2)


def _wide(tokens: int, columns: int, width: int, multiprocessors: int) -> Tiling:
    """Of a gated product of many tokens: the gate is applied to sums, not to what was written.

    In us, beside cuBLAS and its gate apart: 128 tokens and 28672 x 4096 66 and 71, 8192 and 16384 x
    2048 802 and 858. With 256 tokens, with fewer in a tile of 128, and with 8192 and longer rows
    there is no difference, or cuBLAS is ahead.
    """
    if 128 - WIDE_SPARE <= tokens <= 128:
        alone = -(-columns // 64) <= multiprocessors
        stages, warps = (6, 8) if alone else (3, 4)
        return Tiling("wide", 64, 64, 1, stages, warps, early=128 * stages, block_m=128)
    if tokens >= MANY_TOKENS and width <= 2048:
        return Tiling(
            "wide", 128, 64, stages=4, warps=8, early=512, block_m=128, programs=multiprocessors,
            group=16,
        )  # fmt: skip
    return Tiling("cublas")


def scaled_ahead(tokens: int, width: int) -> bool:
    """Whether a product leaves its result scaled for the norm after it, and that is then read.

    By tokens and the width of the stream alone: who writes and who reads have tilings of their own.
    In us a layer of a chain of products on an H200, and with the norm as a launch: 8 tokens, 0.6B
    20.4 (21.5), 1B 40.9 (42.0), 8B 114.5 (114.9); 32 tokens 22.8 (23.8), 43.2 (45.0), 118.7
    (120.1); 64 tokens 26.4 (25.6), 45.9 (46.4), 125.7 (126.4).
    """
    most = DOT_TOKENS if width >= AHEAD_WIDTH else AHEAD_TOKENS
    return GEMV_TOKENS < tokens <= most


def padded(tokens: int) -> int:
    """Tokens as `dot_kernel` pads them: a power of 2 from 16."""
    return max(16, 1 << (tokens - 1).bit_length())


def _power(width: int) -> int:
    return 1 << (width - 1).bit_length()


def narrow(tokens: int, rows: int, width: int, multiprocessors: int = 132) -> Tiling | None:
    """The tiling of a small weight's plain product, such as a router's; None: cuBLAS is as good.

    The whole weight is a tile or less a multiprocessor, and time is latency: every program has all
    it reads on its way at once. cuBLAS takes 5.5 to 6.5 us for 128 x 2048 and 8 to 256 tokens.
    """
    if tokens > NARROW_TOKENS or 2 * rows * width > NARROW_BYTES * multiprocessors:
        return None
    block_k, stages = 128, 4
    block_m = min(64, padded(tokens))
    split = 1
    while split * 2 * block_k * stages <= width and split < NARROW_SPLIT:
        split *= 2
    return Tiling("dot", NARROW_ROWS, block_k, split, stages, 4, 0, block_m)


def filled(
    block_k: int, tokens: int, columns: int, width: int, gated: bool, multiprocessors: int
) -> Tiling:
    """A tiling for `dot_kernel`: as many equal parts of K as there are multiprocessors for.

    What counts is bytes on their way in a multiprocessor: the fewer programs it has, the more
    stages they get. Against `bounded`, us a layer of a chain on an H200: o and down of 4096 and 8
    tokens 2.7 and 1.5 less, gate and up of 2 x 3072 x 1024 and 64 tokens 3.4. Parts have to meet,
    which costs more the more there are, and of the larger a tile: 1024 x 2048 and 64 tokens in four
    4.8, in eight 5.0. Where there is room for it tokens are parted as well, of gated products,
    whose parts of K cost more: 1.3 less for the same gate and up.
    """
    block_n, block_k, block_m = 64, min(block_k, max(16, _power(width))), padded(tokens)
    rows = block_n * (2 if gated else 1)
    tiles, steps = -(-columns // block_n), -(-width // block_k)
    if gated and tokens > 32 and 2 * tiles <= multiprocessors:
        block_m //= 2
        tiles *= 2
    stage = 2 * block_k * (rows + block_m)
    warps = 8 if rows * block_m > 64 * 128 else 4
    parts = MOST_PARTS if block_m <= 32 else MOST_WIDE_PARTS
    most = min(multiprocessors // tiles, steps // 2, parts)
    if 2 * width * (rows + block_m) <= WHOLE_BYTES and not gated:
        most = 1
    split = max((n for n in range(2, most + 1) if not steps % n), default=1)

    def stages_of(resident: int) -> int:
        return max(2, min(8, steps // split, SHARED_BYTES // resident // stage))

    # One stage is being multiplied: what the others hold is on its way.
    most = max(1, min(4, -(-tiles * split // multiprocessors)))
    stages = stages_of(max(range(1, most + 1), key=lambda n: (n * (stages_of(n) - 1), n)))
    early = 2 * block_k * stages
    return Tiling("dot", block_n, block_k, split, stages, warps, early, block_m)


def bounded(
    tiling: Tiling, tokens: int, columns: int, width: int, gated: bool, multiprocessors: int
) -> Tiling:
    """A tiling for `dot_kernel` with stages that fit and a split that fills the device."""
    block_k = min(tiling.block_k, max(16, _power(width)))
    stage = 2 * block_k * (tiling.block_n * (2 if gated else 1) + padded(tokens))
    stages = max(1, min(tiling.stages, SHARED_BYTES // stage))
    programs = -(-columns // tiling.block_n)
    # Parts that meet are there at once: 64 tokens, 2560 x 2048 in 160 programs 9.6 us, in 80 6.7.
    most = 3 * multiprocessors // 2 if gated else multiprocessors
    split = 1
    while programs * split * 2 <= most and width >= split * 2 * block_k * stages:
        split *= 2
    warps = 8 if tiling.block_n * padded(tokens) * (2 if gated else 1) > 64 * 128 else 4
    early = 2 * block_k * stages
    return Tiling("dot", tiling.block_n, block_k, split, stages, warps, early)
