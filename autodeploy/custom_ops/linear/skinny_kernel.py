"""Kernels for products of few rows with a weight matrix: each weight is read once, at full speed.

`gemv_kernel` is for one or two tokens: products and sums in float32, no tensor cores. `dot_kernel`
is for up to 128: the weight's tile is the tall operand of the matrix instruction and the tokens,
padded to 16 or more, are the narrow one.

Both begin to fetch weights before they wait for the kernel in front: nothing writes weights. A
norm is applied without a pass of its own: its weight scales x, the sum of squares is gathered on
the way, and the finished sums are divided by the root. This rounds less often than norm and
product apart.
"""

import triton
import triton.language as tl

from ..gate.activation_kernel import activate


@triton.jit
def gate(first, second, ACTIVATION: tl.constexpr, GATED: tl.constexpr, DTYPE: tl.constexpr):
    """Products in float32 to the gated or activated product, rounded where the reference rounds."""
    y = first
    if GATED:
        y = activate(first.to(DTYPE).to(tl.float32), ACTIVATION, DTYPE).to(DTYPE).to(tl.float32)
        y = y * second.to(DTYPE).to(tl.float32)
    elif ACTIVATION != "linear":
        y = activate(first.to(DTYPE).to(tl.float32), ACTIVATION, DTYPE)
    return y


@triton.jit
def norm_scale(
    norm_weight, k, offset, K: tl.constexpr, HAS_OFFSET: tl.constexpr, ROUNDED: tl.constexpr
):
    """What the norm multiplies column k by, float32. ROUNDED: offset + weight is rounded."""
    loaded = tl.load(norm_weight + k, mask=k < K, other=0.0)
    return shifted(loaded, offset, HAS_OFFSET, ROUNDED)


@triton.jit
def shifted(loaded, offset, HAS_OFFSET: tl.constexpr, ROUNDED: tl.constexpr):
    """As `norm_scale`, of what was loaded of a norm's weight."""
    scale = loaded.to(tl.float32)
    if HAS_OFFSET:
        scale = scale + offset
        if ROUNDED:
            scale = scale.to(loaded.dtype).to(tl.float32)
    return scale


@triton.jit
def prefetch(start, row, outputs, K: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """Asks for BYTES from `start` on of ROWS rows of a weight to be brought to the L2 cache.

    Each of 128 threads or more asks for one piece, of a multiple of 16 bytes.
    """
    PIECES: tl.constexpr = 128 // ROWS if ROWS < 128 else 1
    PIECE: tl.constexpr = BYTES // (16 * PIECES) * 16
    if PIECE > 0:
        lane = tl.arange(0, ROWS * PIECES)
        there = tl.minimum(row + lane // PIECES, outputs - 1).to(tl.int64)
        address = start + there * K + (lane % PIECES) * (PIECE // 2)
        tl.inline_asm_elementwise(
            "{ cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r",
            [address.to(tl.int64), tl.full((ROWS * PIECES,), PIECE, tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit(do_not_specialize=["eps", "offset"])
def gemv_kernel(
    x, weight, bias, norm_weight, residual, out, outputs, eps, offset,
    K: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_OFFSET: tl.constexpr,
    ROUNDED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [TOKENS, K], TOKENS 1 or 2, weight [outputs or twice that, K] -> out [TOKENS, outputs].

    One program makes BLOCK_N columns of all tokens. The next tile of weights is on its way in
    registers while the last one is multiplied. EARLY: bytes of each weight row that are asked for
    before the wait.
    """
    DTYPE: tl.constexpr = out.dtype.element_ty
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < outputs
    # Rows past the end are read as the last one, and not stored.
    row = tl.minimum(column, outputs - 1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    tile = weight + row[:, None] * K + k[None, :]
    other_tile = tile
    w = tl.load(tile, mask=(k < K)[None, :], other=0.0, eviction_policy="evict_first")
    v = w
    if GATED:
        other_tile = tile + tl.cast(outputs, tl.int64) * K
        v = tl.load(other_tile, mask=(k < K)[None, :], other=0.0, eviction_policy="evict_first")
    if EARLY > 0:
        prefetch(weight, tl.program_id(0) * BLOCK_N, outputs, K, BLOCK_N, EARLY)
        if GATED:
            half = weight + tl.cast(outputs, tl.int64) * K
            prefetch(half, tl.program_id(0) * BLOCK_N, outputs, K, BLOCK_N, EARLY)
    shift = tl.zeros((BLOCK_N,), tl.float32)
    other_shift = shift
    if HAS_BIAS:
        shift = tl.load(bias + row).to(tl.float32)
        if GATED:
            other_shift = tl.load(bias + outputs + row).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    # Asked for before the loop: programs are short, and the result may go to where this lies.
    r0 = tl.zeros((BLOCK_N,), tl.float32)
    r1 = r0
    if HAS_RESIDUAL:
        r0 = tl.load(residual + column, mask=inside, other=0.0).to(tl.float32)
        if TOKENS > 1:
            r1 = tl.load(residual + outputs + column, mask=inside, other=0.0).to(tl.float32)
    a0 = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    a1 = a0
    b0 = a0
    b1 = a0
    s0 = tl.zeros((BLOCK_K,), tl.float32)
    s1 = s0
    for start in range(0, K, BLOCK_K):
        here = start + k
        following = here + BLOCK_K
        ahead = (following < K)[None, :]
        next_w = tl.load(
            tile + start + BLOCK_K, mask=ahead, other=0.0, eviction_policy="evict_first"
        )
        next_v = next_w
        if GATED:
            next_v = tl.load(
                other_tile + start + BLOCK_K, mask=ahead, other=0.0, eviction_policy="evict_first"
            )
        x0 = tl.load(x + here, mask=here < K, other=0.0).to(tl.float32)
        x1 = x0
        if TOKENS > 1:
            x1 = tl.load(x + K + here, mask=here < K, other=0.0).to(tl.float32)
        if NORM:
            s0 += x0 * x0
            if TOKENS > 1:
                s1 += x1 * x1
            if HAS_NORM_WEIGHT:
                scale = norm_scale(norm_weight, here, offset, K, HAS_OFFSET, ROUNDED)
                x0 = x0 * scale
                x1 = x1 * scale
        wide = w.to(tl.float32)
        a0 += wide * x0[None, :]
        if TOKENS > 1:
            a1 += wide * x1[None, :]
        if GATED:
            wide = v.to(tl.float32)
            b0 += wide * x0[None, :]
            if TOKENS > 1:
                b1 += wide * x1[None, :]
        w = next_w
        v = next_v

    for token in tl.static_range(TOKENS):
        first = tl.sum(a0 if token == 0 else a1, axis=1)
        second = first
        if GATED:
            second = tl.sum(b0 if token == 0 else b1, axis=1)
        if NORM:
            inverse = tl.rsqrt(tl.sum(s0 if token == 0 else s1, axis=0) / K + eps)
            first = first * inverse
            second = second * inverse
        if HAS_BIAS:
            first += shift
            second += other_shift
        y = gate(first, second, ACTIVATION, GATED, DTYPE)
        place = token * outputs + column
        if HAS_RESIDUAL:
            y = y.to(tl.float32) + (r0 if token == 0 else r1)
        tl.store(out + place, y.to(DTYPE), mask=inside)


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
    first, second, squares, bias, added, out, column, token, tokens, outputs, eps,
    K: tl.constexpr, NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Whole sums [BLOCK_N, BLOCK_M] and sums of squares [BLOCK_M] to a tile of out.

    added: of `residual_tile`.
    """
    DTYPE: tl.constexpr = out.dtype.element_ty
    mask = (column < outputs)[:, None] & (token < tokens)[None, :]
    if NORM:
        inverse = tl.rsqrt(squares / K + eps)[None, :]
        first = first * inverse
        second = second * inverse
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


@triton.jit(do_not_specialize=["tokens", "eps", "offset"])
def dot_kernel(
    x, weight, bias, norm_weight, residual, out, scratch, arrivals, tokens, outputs, eps, offset,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, NORM: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr,
    HAS_OFFSET: tl.constexpr, ROUNDED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    EARLY: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [tokens, K], weight [outputs or twice that, K] -> out [tokens, outputs].

    Program (i, j, m) makes columns i * BLOCK_N .. of tokens m * BLOCK_M .. over the j-th of SPLIT
    parts of K. The last part of a tile to arrive adds up all of them in order, so results do not
    depend on which one that is. scratch: float32, one slot per program; arrivals: int32 zeros, one
    per tile, left as zeros. EARLY: bytes of each weight row that are asked for before the wait.
    WIDE: products of float32, for the interpreter, which has none of bfloat16.
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
    if NORM and HAS_NORM_WEIGHT:
        # One step ahead: it is too little for an asynchronous copy, and would be waited for.
        following = tl.load(norm_weight + begin + k, mask=begin + k < K, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    # Asked for before the loop, which hides it, if it is a few registers. Nobody has written the
    # result yet, which may go to where this lies.
    if BLOCK_M <= 64:
        added = residual_tile(residual, column, token, tokens, outputs, HAS_RESIDUAL)
    first = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    second = first
    square = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
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
        if NORM:
            wide = values.to(tl.float32)
            square += wide * wide
            if HAS_NORM_WEIGHT:
                scale = shifted(following, offset, HAS_OFFSET, ROUNDED)
                after = here + BLOCK_K
                following = tl.load(norm_weight + after, mask=after < K, other=0.0)
                values = (wide * scale[None, :]).to(x.dtype.element_ty)
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
    squares = tl.sum(square, axis=1)
    if BLOCK_M > 64:
        added = residual_tile(residual, column, token, tokens, outputs, HAS_RESIDUAL)

    if SPLIT == 1:
        finish(
            first, second, squares, bias, added, out, column, token, tokens, outputs, eps,
            K, NORM, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, GATED,
        )  # fmt: skip
    else:
        AREA: tl.constexpr = BLOCK_N * BLOCK_M
        SLOT: tl.constexpr = AREA * (2 if GATED else 1) + BLOCK_M
        number = tl.program_id(2) * tl.num_programs(0) + tile
        slots = scratch + number.to(tl.int64) * (SPLIT * SLOT)
        mine = slots + part * SLOT
        index = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + beside[None, :]
        tl.store(mine + index, first)
        if GATED:
            tl.store(mine + AREA + index, second)
        if NORM:
            tl.store(mine + (SLOT - BLOCK_M) + beside, squares)
        # All threads have stored before one of them says so.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + number, 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            tl.store(arrivals + number, 0)
            first = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            second = first
            squares = tl.zeros((BLOCK_M,), tl.float32)
            for other in tl.static_range(SPLIT):
                theirs = slots + other * SLOT
                first += tl.load(theirs + index, cache_modifier=".cg")
                if GATED:
                    second += tl.load(theirs + AREA + index, cache_modifier=".cg")
                if NORM:
                    squares += tl.load(theirs + (SLOT - BLOCK_M) + beside, cache_modifier=".cg")
            finish(
                first, second, squares, bias, added, out, column, token, tokens, outputs, eps,
                K, NORM, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, GATED,
            )  # fmt: skip
