"""Kernel for products of up to 128 rows with a weight matrix, which is read once, at full speed.

The weight's tile is the tall operand of the matrix instruction; the tokens, padded to 16 or more,
are the narrow one. Weights are asked for before the wait for the kernel in front: nothing writes
them. Where there are few tiles, rows are split, and the sums of their parts meet.

The norm between two products has no pass of its own. Whoever finishes the residual stream also
leaves it multiplied by the norm's weight, and its sums of squares; the next product multiplies the
former, and divides what it gets by the root of the latter.
"""

import triton
import triton.language as tl

from .gemv_kernel import gate, prefetch, shifted

# The most parts that can wait for each other, `dot_linear.MAX_PARTS`.
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
    """Whole sums [BLOCK_N, BLOCK_M] to a tile of out, which is returned as it is stored.

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
    y = y.to(DTYPE)
    tl.store(out + place, y, mask=mask)
    return y


@triton.jit
def squares_tile(squares, token, tokens, SQUARES: tl.constexpr):
    """Partial sums of squares [SQUARES or more, BLOCK_M] of rows of the residual stream."""
    POWER: tl.constexpr = triton.next_power_of_2(SQUARES)
    number = tl.arange(0, POWER)
    mask = (number < SQUARES)[:, None] & (token < tokens)[None, :]
    return tl.load(squares + token[None, :] * SQUARES + number[:, None], mask=mask, other=0.0)


@triton.jit
def inverse_roots(partial, eps, K: tl.constexpr):
    """What a norm multiplies rows of K numbers by [1, BLOCK_M]. partial: of `squares_tile`."""
    return tl.rsqrt(tl.sum(partial, axis=0) / K + eps)[None, :]


@triton.jit
def leave_scaled(
    y, scale, new_scaled, new_squares, column, token, tokens, outputs, COLUMNS: tl.constexpr
):
    """Of finished columns y of the residual stream, what the product after the next norm takes.

    y [BLOCK_N, tokens of a share] times the norm's weight, to new_scaled. Sums of their squares, to
    new_squares, which have a number for each COLUMNS: a larger tile's is its first, the others 0.
    """
    COUNT: tl.constexpr = y.shape[0] // COLUMNS
    inside = token < tokens
    mask = (column < outputs)[:, None] & inside[None, :]
    stored = tl.where(mask, y.to(tl.float32), 0.0)
    place = token[None, :] * outputs + column[:, None]
    scaled = stored * scale[:, None]
    tl.store(new_scaled + place, scaled.to(new_scaled.dtype.element_ty), mask=mask)
    numbers = (outputs + COLUMNS - 1) // COLUMNS
    total = tl.sum(stored * stored, axis=0)
    for extra in tl.static_range(COUNT):
        at = tl.program_id(0) * COUNT + extra
        left = total if extra == 0 else tl.zeros_like(total)
        tl.store(new_squares + token * numbers + at, left, mask=inside & (at < numbers))


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
    slots, index, mask, SPLIT: tl.constexpr, SLOT: tl.constexpr, AREA: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """Sums, in order, of what the parts of a tile left at `index` of their slots."""
    first = tl.zeros(index.shape, tl.float32)
    second = first
    for part in tl.static_range(SPLIT):
        # Other programs wrote it: past the first-level cache.
        slot = slots + part * SLOT
        first += tl.load(slot + index, mask=mask, other=0.0, cache_modifier=".cg")
        if GATED:
            second += tl.load(slot + AREA + index, mask=mask, other=0.0, cache_modifier=".cg")
    return first, second


@triton.jit(do_not_specialize=["tokens", "eps", "offset"])
def dot_kernel(
    x, weight, bias, residual, out, scratch, arrivals, squares, next_weight, new_scaled,
    new_squares, tokens, outputs, eps, offset,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, SHARED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, SQUARES: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_NEXT_WEIGHT: tl.constexpr, HAS_OFFSET: tl.constexpr, ROUNDED: tl.constexpr,
    EARLY: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [tokens, K], weight [outputs or twice that, K] -> out [tokens, outputs].

    Program (i, j, m) makes columns i * BLOCK_N .. of tokens m * BLOCK_M .. over the j-th of SPLIT
    parts of K, whose sums are added up in order: by the part of a tile that is the last to arrive,
    or, SHARED, by each part for its share of the tokens. These wait for each other, so all programs
    must run at a time. scratch: float32, for each program what it makes. arrivals: int32,
    one per tile; zeros, or if SHARED multiples of ROUND. EARLY: bytes of each weight row that are
    asked for before the wait. WIDE: products of float32, for the interpreter, which has none of
    bfloat16.

    SQUARES: x is a `new_scaled`, and squares [tokens, SQUARES] are what was left with it; 0: it is
    no such thing. COLUMNS: of `leave_scaled`; 0: nothing is left. next_weight and offset are those
    of the norm that is to come.
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

    own = beside
    if SHARED:
        own = part * (BLOCK_M // SPLIT) + tl.arange(0, BLOCK_M // SPLIT)
    mine = tl.program_id(2) * BLOCK_M + own
    # Asked for before the loop, which hides it, if it is a few registers. Nobody has written the
    # result yet, which may go to where this lies.
    if BLOCK_M <= 64 or SHARED:
        added = residual_tile(residual, column, mine, tokens, outputs, HAS_RESIDUAL)
    scale = tl.full((BLOCK_N,), 1.0, tl.float32)
    if COLUMNS > 0 and HAS_NEXT_WEIGHT:
        loaded = tl.load(next_weight + column, mask=column < outputs, other=0.0)
        scale = shifted(loaded, offset, HAS_OFFSET, ROUNDED)
    # Where parts meet there is time for it then, and registers are free.
    if SQUARES > 0 and SPLIT == 1:
        partial = squares_tile(squares, mine, tokens, SQUARES)
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
        added = residual_tile(residual, column, mine, tokens, outputs, HAS_RESIDUAL)

    complete = True
    if SPLIT > 1:
        AREA: tl.constexpr = BLOCK_N * BLOCK_M
        SLOT: tl.constexpr = AREA * (2 if GATED else 1)
        number = tl.program_id(2) * tl.num_programs(0) + tile
        slots = scratch + number.to(tl.int64) * (SPLIT * SLOT)
        within = tl.arange(0, BLOCK_N)[:, None]
        # Token by token, so that shares lie together.
        index = within + beside[None, :] * BLOCK_N
        tl.store(slots + part * SLOT + index, first)
        if GATED:
            tl.store(slots + part * SLOT + AREA + index, second)
        if SQUARES > 0:
            partial = squares_tile(squares, mine, tokens, SQUARES)
        if SHARED:
            arrive(arrivals + number, SPLIT)
        else:
            complete = is_last(arrivals + number, SPLIT)
    if complete:
        whole = first
        other = second
        if SPLIT > 1:
            whole, other = gather(
                slots, within + own[None, :] * BLOCK_N, (mine < tokens)[None, :], SPLIT, SLOT, AREA,
                GATED,
            )  # fmt: skip
        if SQUARES > 0:
            inverse = inverse_roots(partial, eps, K)
            whole *= inverse
            if GATED:
                other *= inverse
        y = finish(
            whole, other, bias, added, out, column, mine, tokens, outputs,
            HAS_BIAS, HAS_RESIDUAL, ACTIVATION, GATED,
        )  # fmt: skip
        if COLUMNS > 0:
            leave_scaled(y, scale, new_scaled, new_squares, column, mine, tokens, outputs, COLUMNS)
