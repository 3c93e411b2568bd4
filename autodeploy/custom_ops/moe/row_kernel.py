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
    BLOCK_N columns. Shapes as in `block_product_kernel`."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pair = tl.program_id(1)
    expert = tl.load(index + pair).to(tl.int64)
    if (expert < 0) | (expert >= EXPERTS):
        return
    start = tl.program_id(0) * BLOCK_N
    row, exists = weight_rows(start, COLUMNS, BLOCK_N, GATED, INTERLEAVED, PAIRED)
    ROWS: tl.constexpr = BLOCK_N * 2 if GATED else BLOCK_N
    EVEN: tl.constexpr = WIDTH % BLOCK_K == 0 and COLUMNS % BLOCK_N == 0
    x += (pair // CHOICES).to(tl.int64) * x_stride
    depth = tl.arange(0, BLOCK_K)
    w_at = weight + expert * w_expert + (row[:, None] * w_row + depth[None, :] * w_column)
    total = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for k in tl.range(0, WIDTH, BLOCK_K, num_stages=STAGES):
        if EVEN:
            x_part = tl.load(x + k + depth)
            w_tile = tl.load(w_at + k * w_column)
        else:
            inside = k + depth < WIDTH
            x_part = tl.load(x + k + depth, mask=inside, other=0.0)
            w_tile = tl.load(w_at + k * w_column, mask=exists[:, None] & inside[None, :], other=0.0)
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
def row_down_kernel(
    x,
    index,
    weights,
    weight,
    bias,
    out,
    w_expert,
    w_row,
    w_column,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[t] = sum over a token's pairs p of weights[p] * (weight[index[p]] @ x[p] + bias).

    x [T * CHOICES, WIDTH] without gaps. One program per token and BLOCK_N columns; the sum stays
    in float32 until its end.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = column < COLUMNS
    depth = tl.arange(0, BLOCK_K)
    STEPS: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    w_at = weight + (column[:, None] * w_row + depth[None, :] * w_column)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    # One loop over choices and depth, so that loads of the next expert start in time.
    for step in tl.range(0, CHOICES * STEPS, num_stages=STAGES):
        pair = token * CHOICES + step // STEPS
        k = (step % STEPS) * BLOCK_K
        expert = tl.load(index + pair).to(tl.int64)
        here = (expert >= 0) & (expert < EXPERTS)
        inside = (k + depth < WIDTH) & here
        x_part = tl.load(x + pair * WIDTH + k + depth, mask=inside, other=0.0).to(tl.float32)
        x_part = x_part * tl.load(weights + pair).to(tl.float32)
        mask = exists[:, None] & inside[None, :]
        w_tile = tl.load(w_at + (expert * w_expert + k * w_column), mask=mask, other=0.0)
        total += w_tile.to(tl.float32) * x_part[None, :]
    result = tl.sum(total, axis=1)
    if HAS_BIAS:
        for choice in tl.static_range(CHOICES):
            pair = token * CHOICES + choice
            expert = tl.load(index + pair).to(tl.int64)
            here = (expert >= 0) & (expert < EXPERTS)
            shift = tl.load(bias + expert * COLUMNS + column, mask=exists & here, other=0.0)
            result += shift.to(tl.float32) * tl.load(weights + pair).to(tl.float32)
    tl.store(out + token * COLUMNS + column, result.to(out.dtype.element_ty), mask=exists)
