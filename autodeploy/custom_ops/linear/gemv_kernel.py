"""Kernel for products of a row or two with a weight matrix, which is read once, at full speed.

Products and sums are of float32, without tensor cores. Weights are fetched before the wait for the
kernel in front: nothing writes them. A norm is applied without a pass of its own: its weight scales
x, the sum of squares is gathered on the way, and the finished sums are divided by the root. This
rounds less often than norm and product apart.
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
    before the wait. x is float32, or of the weight's dtype, and so are residual and out.
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
