"""Kernel for products of up to 128 rows with a weight matrix, which is read once, at full speed.

The weight's tile is the tall operand of the matrix instruction; the tokens, padded to 16 or more,
are the narrow one. Weights are asked for before the wait for the kernel in front: nothing writes
them. Where there are few tiles, rows are split, and the sums of their parts meet.
"""

import triton
import triton.language as tl

from .gemv_kernel import gate, prefetch

# More than the most parts that wait for each other.
ROUND = tl.constexpr(64)


@triton.jit
def residual_tile(residual, column, token, tokens, outputs, HAS_RESIDUAL: tl.constexpr):
    """What is added to columns [BLOCK_N] of tokens [BLOCK_M]; 0 if nothing is."""
    tile = 0.0
    if HAS_RESIDUAL:
        mask = (column < outputs)[:, None] & (token < tokens)[None, :]
        place = token[None, :] * outputs + column[:, None]
        tile = tl.load(residual + place, mask=mask, other=0.0)
    return tile


@triton.jit
def finish(
    first, second, bias, added, out, column, token, tokens, outputs,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """Whole sums [BLOCK_N, BLOCK_M] to a tile of out.

    added: of `residual_tile`.
    """
    DTYPE: tl.constexpr = out.dtype.element_ty
    mask = (column < outputs)[:, None] & (token < tokens)[None, :]
    if HAS_BIAS:
        first += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)[:, None]
        if GATED:
            other = tl.load(bias + outputs + column, mask=column < outputs, other=0.0)
            second += other.to(tl.float32)[:, None]
    y = gate(first, second, ACTIVATION, GATED, DTYPE)
    place = token[None, :] * outputs + column[:, None]
    if HAS_RESIDUAL:
        y = y + added.to(tl.float32)
    tl.store(out + place, y.to(DTYPE), mask=mask)


@triton.jit
def arrive(arrivals, SPLIT: tl.constexpr):
    """Says that this part of a tile is left; returns once all SPLIT are, a power of 2 up to ROUND.

    Each launch adds ROUND to the count, so nobody has to reset it.
    """
    # All threads have stored before one of them says so.
    tl.debug_barrier()
    before = tl.atomic_add(arrivals, ROUND // SPLIT, sem="acq_rel")
    complete = (before & -ROUND) + ROUND
    seen = before + ROUND // SPLIT
    while seen - complete < 0:
        seen = tl.atomic_add(arrivals, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def is_last(arrivals, SPLIT: tl.constexpr):
    """Whether this part of a tile is the last of SPLIT to be left; the count is 0 again then."""
    tl.debug_barrier()
    last = tl.atomic_add(arrivals, 1, sem="acq_rel") == SPLIT - 1
    tl.store(arrivals, 0, mask=last)
    return last


@triton.jit
def gather(
    slots, index, SPLIT: tl.constexpr, SLOT: tl.constexpr, AREA: tl.constexpr, GATED: tl.constexpr
):
    """Sums, in order, of what the parts of a tile left at `index` of their slots."""
    first = tl.zeros(index.shape, tl.float32)
    second = first
    for part in tl.static_range(SPLIT):
        # Other programs wrote it: past the first-level cache.
        first += tl.load(slots + part * SLOT + index, cache_modifier=".cg")
        if GATED:
            second += tl.load(slots + part * SLOT + AREA + index, cache_modifier=".cg")
    return first, second


@triton.jit(do_not_specialize=["tokens"])
def dot_kernel(
    x, weight, bias, residual, out, scratch, arrivals, tokens, outputs,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, SHARED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, EARLY: tl.constexpr, WIDE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x [tokens, K], weight [outputs or twice that, K] -> out [tokens, outputs].

    Program (i, j, m) makes columns i * BLOCK_N .. of tokens m * BLOCK_M .. over the j-th of SPLIT
    parts of K, whose sums are added up in order: by the part of a tile that is the last to arrive,
    or, SHARED, by each part for its share of the columns. These wait for each other, so all
    programs must run at a time. scratch: float32, for each program what it makes. arrivals: int32,
    one per tile; zeros, or if SHARED multiples of ROUND. EARLY: bytes of each weight row that are
    asked for before the wait. WIDE: products of float32, for the interpreter, which has none of
    bfloat16.
    """
    tile = tl.program_id(0)
    part = tl.program_id(1)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    beside = tl.arange(0, BLOCK_M)
    token = tl.program_id(2) * BLOCK_M + beside
    k = tl.arange(0, BLOCK_K)
    row = tl.minimum(column, outputs - 1).to(tl.int64)
    SPAN: tl.constexpr = (K + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT) * BLOCK_K
    EVEN: tl.constexpr = K % (BLOCK_K * SPLIT) == 0
    begin = part * SPAN
    rows = weight + row * K + begin
    half = tl.cast(outputs, tl.int64) * K
    if EARLY > 0:
        prefetch(weight + begin, tile * BLOCK_N, outputs, K, BLOCK_N, EARLY)
        if GATED:
            prefetch(weight + half + begin, tile * BLOCK_N, outputs, K, BLOCK_N, EARLY)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    own = tl.arange(0, BLOCK_N)
    if SHARED:
        own = part * (BLOCK_N // SPLIT) + tl.arange(0, BLOCK_N // SPLIT)
    # Asked for before the loop, which hides it, if it is a few registers. Nobody has written the
    # result yet, which may go to where this lies.
    if BLOCK_M <= 64 or SHARED:
        added = residual_tile(residual, tile * BLOCK_N + own, token, tokens, outputs, HAS_RESIDUAL)
    first = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    second = first
    w_tile = rows[:, None] + k[None, :]
    x_tile = x + token[:, None] * K + begin + k[None, :]
    present = (token < tokens)[:, None]
    for step in range(0, SPAN, BLOCK_K):
        here = begin + step + k
        if EVEN:
            w = tl.load(w_tile + step, eviction_policy="evict_first")
            values = tl.load(x_tile + step, mask=present, other=0.0)
        else:
            w = tl.load(
                w_tile + step, mask=(here < K)[None, :], other=0.0, eviction_policy="evict_first"
            )
            values = tl.load(x_tile + step, mask=present & (here < K)[None, :], other=0.0)
        across = tl.trans(values)
        if WIDE:
            w = w.to(tl.float32)
            across = across.to(tl.float32)
        first = tl.dot(w, across, first)
        if GATED:
            if EVEN:
                v = tl.load(w_tile + half + step, eviction_policy="evict_first")
            else:
                v = tl.load(
                    w_tile + half + step,
                    mask=(here < K)[None, :],
                    other=0.0,
                    eviction_policy="evict_first",
                )
            if WIDE:
                v = v.to(tl.float32)
            second = tl.dot(v, across, second)
    if not (BLOCK_M <= 64 or SHARED):
        added = residual_tile(residual, tile * BLOCK_N + own, token, tokens, outputs, HAS_RESIDUAL)

    if SPLIT == 1:
        finish(
            first, second, bias, added, out, column, token, tokens, outputs,
            HAS_BIAS, HAS_RESIDUAL, ACTIVATION, GATED,
        )  # fmt: skip
    else:
        AREA: tl.constexpr = BLOCK_N * BLOCK_M
        SLOT: tl.constexpr = AREA * (2 if GATED else 1)
        number = tl.program_id(2) * tl.num_programs(0) + tile
        slots = scratch + number.to(tl.int64) * (SPLIT * SLOT)
        index = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + beside[None, :]
        tl.store(slots + part * SLOT + index, first)
        if GATED:
            tl.store(slots + part * SLOT + AREA + index, second)
        complete = True
        if SHARED:
            arrive(arrivals + number, SPLIT)
        else:
            complete = is_last(arrivals + number, SPLIT)
        if complete:
            whole, other = gather(
                slots, own[:, None] * BLOCK_M + beside[None, :], SPLIT, SLOT, AREA, GATED
            )
            finish(
                whole, other, bias, added, out, tile * BLOCK_N + own, token, tokens, outputs,
                HAS_BIAS, HAS_RESIDUAL, ACTIVATION, GATED,
            )  # fmt: skip
