"""Kernels of the experts for a token or two: each pair reads its expert's weights by itself.

Nothing is sorted. Products are sums of float32 in registers: with one row there is nothing for a
tensor core to share, and all that counts is how many bytes of weights are on their way.
"""

import triton
import triton.language as tl

from ..gate.activation_kernel import activate
from .experts_kernel import gated, weight_rows


@triton.jit
def row_up_kernel(
    x,
    index,
    weight,
    bias,
    out,
    x_stride,
    w_expert,
    w_row,
    w_column,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAIRED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[p] = activation(weight[index[p]] @ x[p // CHOICES] + bias); one program per pair and
    BLOCK_N columns. Shapes as in `block_product_kernel`. STAGES: of the loop over depth, if the
    rows are not read at once. SHARED: of a token's pairs, the first are of the first experts."""
    pair = tl.program_id(1)
    place = pair % CHOICES
    # Whole rows of known experts are on their way while a router still chooses the others.
    AHEAD: tl.constexpr = SHARED if PDL and BLOCK_K >= WIDTH else 0
    if PDL:  # noqa: SIM102 - one is known when it is compiled, the other when it runs
        if place >= AHEAD:
            tl.extra.cuda.gdc_wait()
            # Only now: `row_down_kernel` may begin to read weights when the experts are known.
            tl.extra.cuda.gdc_launch_dependents()
    expert = tl.load(index + pair, mask=place >= SHARED, other=0)
    expert = tl.where(place < SHARED, place, expert).to(tl.int64)
    if (expert < 0) | (expert >= EXPERTS):
        return
    start = tl.program_id(0) * BLOCK_N
    row, exists = weight_rows(start, COLUMNS, BLOCK_N, GATED, INTERLEAVED, PAIRED)
    ROWS: tl.constexpr = BLOCK_N * 2 if GATED else BLOCK_N
    EVEN: tl.constexpr = WIDTH % BLOCK_K == 0 and COLUMNS % BLOCK_N == 0
    x += (pair // CHOICES).to(tl.int64) * x_stride
    depth = tl.arange(0, BLOCK_K)
    w_at = weight + expert * w_expert + (row[:, None] * w_row + depth[None, :] * w_column)
    if BLOCK_K >= WIDTH:
        inside = depth < WIDTH
        w_tile = tl.load(w_at, mask=exists[:, None] & inside[None, :], other=0.0)
        # All loads of weights are under way before one is waited for: ptxas mixes them with sums.
        tl.debug_barrier()
        if AHEAD > 0:  # noqa: SIM102
            if place < AHEAD:
                tl.extra.cuda.gdc_wait()
                tl.extra.cuda.gdc_launch_dependents()
        x_part = tl.load(x + depth, mask=inside, other=0.0)
        total = w_tile.to(tl.float32) * x_part.to(tl.float32)[None, :]
    else:
        total = tl.zeros([ROWS, BLOCK_K], tl.float32)
        for k in tl.range(0, WIDTH, BLOCK_K, num_stages=STAGES):
            if EVEN:
                x_part = tl.load(x + k + depth)
                w_tile = tl.load(w_at + k * w_column)
            else:
                inside = k + depth < WIDTH
                mask = exists[:, None] & inside[None, :]
                x_part = tl.load(x + k + depth, mask=inside, other=0.0)
                w_tile = tl.load(w_at + k * w_column, mask=mask, other=0.0)
            total += w_tile.to(tl.float32) * x_part.to(tl.float32)[None, :]
    result = tl.sum(total, axis=1)

    if HAS_BIAS:
        TALL: tl.constexpr = COLUMNS * 2 if GATED else COLUMNS
        result += tl.load(bias + expert * TALL + row, mask=exists, other=0.0).to(tl.float32)
    narrow = out.dtype.element_ty
    result = result.to(narrow).to(tl.float32)
    if GATED:
        if PAIRED:
            gates, others = tl.split(tl.reshape(result, (BLOCK_N, 2)))
        else:
            gates, others = tl.split(tl.trans(tl.reshape(result, (2, BLOCK_N))))
        result = gated(gates, others, ACTIVATION, LIMIT, ALPHA, narrow)
    else:
        result = activate(result, ACTIVATION, narrow)
    column = start + tl.arange(0, BLOCK_N)
    place = out + pair.to(tl.int64) * COLUMNS + column
    tl.store(place, result.to(narrow), mask=column < COLUMNS)


@triton.jit
def _prefetch_rows(start, rows, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BYTES: tl.constexpr):
    """Asks for BYTES from `start` on of rows at offsets [BLOCK_C, BLOCK_N] to be brought to L2.

    Each of 128 threads or more asks for one piece, of a multiple of 16 bytes.
    """
    ROWS: tl.constexpr = BLOCK_C * BLOCK_N
    PIECES: tl.constexpr = 128 // ROWS if ROWS < 128 else 1
    PIECE: tl.constexpr = BYTES // (16 * PIECES) * 16
    if PIECE > 0:
        address = start + rows[:, :, None] + (tl.arange(0, PIECES) * (PIECE // 2))[None, None, :]
        size = tl.full((BLOCK_C, BLOCK_N, PIECES), PIECE, tl.int32)
        tl.inline_asm_elementwise(
            "{ cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r",
            [address.to(tl.int64), size],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def row_down_kernel(
    x,
    index,
    weights,
    weight,
    bias,
    residual,
    out,
    w_expert,
    w_row,
    w_column,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[t] = residual[t] + sum over a token's pairs p of weights[p] * (weight[index[p]] @ x[p]
    + bias).

    EARLY: bytes of each row, after its first tile, that are asked for before the wait.

    x [T * CHOICES, WIDTH] without gaps, residual and out [T, COLUMNS]. One program per token and
    BLOCK_N columns reads those of all choices side by side, the next tile while it multiplies the
    last one. Sums stay in float32 until their end, and are added in one order.
    """
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = column < COLUMNS
    choice = tl.arange(0, BLOCK_C)
    depth = tl.arange(0, BLOCK_K)
    pair = token * CHOICES + choice
    # Before the wait: `row_up_kernel` let this one start after it had waited itself, so all that
    # came before it is done. Not from L1, which may hold what was here in an earlier layer.
    expert = tl.load(index + pair, mask=choice < CHOICES, other=-1, cache_modifier=".cg")
    here = (expert >= 0) & (expert < EXPERTS)
    expert = tl.where(here, expert, 0).to(tl.int64)
    rows = expert[:, None] * w_expert + column.to(tl.int64)[None, :] * w_row
    some = here[:, None] & exists[None, :]
    tile = weight + (rows[:, :, None] + (depth * w_column)[None, None, :])
    w = tl.load(tile, mask=some[:, :, None] & (depth < WIDTH)[None, None, :], other=0.0)
    share = tl.load(weights + pair, mask=here, other=0.0, cache_modifier=".cg").to(tl.float32)
    place = token * COLUMNS + column
    if HAS_RESIDUAL:
        other = tl.load(residual + place, mask=exists, other=0.0, cache_modifier=".cg")
    if EARLY > 0:
        _prefetch_rows(weight + BLOCK_K, rows, BLOCK_C, BLOCK_N, EARLY)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    total = tl.zeros([BLOCK_C, BLOCK_N, BLOCK_K], tl.float32)
    for k in range(0, WIDTH, BLOCK_K):
        following = k + BLOCK_K + depth
        tile += BLOCK_K * w_column
        next_w = tl.load(
            tile, mask=some[:, :, None] & (following < WIDTH)[None, None, :], other=0.0
        )
        if BLOCK_K < WIDTH:
            # The next tile is under way before this one is waited for, see `row_up_kernel`.
            tl.debug_barrier()
        inside = here[:, None] & (k + depth < WIDTH)[None, :]
        x_part = tl.load(x + pair[:, None] * WIDTH + (k + depth)[None, :], mask=inside, other=0.0)
        total += w.to(tl.float32) * x_part.to(tl.float32)[:, None, :]
        w = next_w
    parts = tl.sum(total, axis=2)
    if HAS_BIAS:
        shift = bias + expert[:, None] * COLUMNS + column[None, :]
        parts += tl.load(shift, mask=some, other=0.0).to(tl.float32)
    result = tl.sum(parts * share[:, None], axis=0)
    if HAS_RESIDUAL:
        result += other.to(tl.float32)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=exists)
