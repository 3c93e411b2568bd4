"""Kernels of the experts: one product over blocks of rows, and the sum over a token's choices.

A pair is one token's one choice; pair p belongs to token p // choices. Blocks of pairs with one
expert come from `sort_kernel`.
"""

import triton
import triton.language as tl

from ..gate.activation_kernel import activate
from ..linear.gemv_kernel import prefetch


@triton.jit
def gated(
    gates, others, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """As `gates.gate`, of float32 that holds numbers of DTYPE."""
    if LIMIT > 0:
        gates = tl.minimum(gates, LIMIT)
        others = tl.minimum(tl.maximum(others, -LIMIT), LIMIT)
    if ALPHA > 0:
        active = gates * tl.sigmoid(gates * ALPHA)
        others = others + 1
    else:
        active = activate(gates, ACTIVATION, DTYPE).to(DTYPE).to(tl.float32)
    return active * others


@triton.jit
def weight_rows(
    start, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """Rows of an expert's weight for BLOCK columns of the result from `start`, and which exist.

    GATED: 2 * BLOCK rows. PAIRED: each gate is followed by its other half, wherever that is in the
    weight; then one thread holds both results. If not, all gates come before all other halves:
    for a weight whose rows are next to each other in memory and not INTERLEAVED.
    """
    if GATED:
        place = tl.arange(0, 2 * BLOCK)
        if INTERLEAVED:
            row = 2 * start + place
            exists = row < 2 * COLUMNS
        elif PAIRED:
            column = start + place // 2
            row = place % 2 * COLUMNS + column
            exists = column < COLUMNS
        else:
            column = start + place % BLOCK
            row = place // BLOCK * COLUMNS + column
            exists = column < COLUMNS
    else:
        row = start + tl.arange(0, BLOCK)
        exists = row < COLUMNS
    return row, exists


@triton.jit
def multiply_block(
    x, weight, bias, out, slot, expert, start, pairs, width, x_stride, w_row, w_column,
    CHOICES: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr, PAIRED: tl.constexpr, ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr, ALPHA: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns from `start` of the pairs `slot` [BLOCK_M]: see `block_product_kernel`.

    weight: of the pairs' expert. bias: of all experts.
    """
    taken = slot < pairs
    # Rows of empty slots are computed of row 0 and never written: no mask in the loop.
    x_row = tl.where(taken, slot // CHOICES, 0).to(tl.int64)
    row, exists = weight_rows(start, COLUMNS, BLOCK_N, GATED, INTERLEAVED, PAIRED)
    ROWS: tl.constexpr = BLOCK_N * 2 if GATED else BLOCK_N
    depth = tl.arange(0, BLOCK_K)
    EVEN: tl.constexpr = WIDTH % BLOCK_K == 0 and COLUMNS % BLOCK_N == 0
    if SWAP:
        x_at = x + (x_row[None, :] * x_stride + depth[:, None])
        w_at = weight + (row[:, None] * w_row + depth[None, :] * w_column)
        total = tl.zeros([ROWS, BLOCK_M], tl.float32)
    else:
        x_at = x + (x_row[:, None] * x_stride + depth[None, :])
        w_at = weight + (row[None, :] * w_row + depth[:, None] * w_column)
        total = tl.zeros([BLOCK_M, ROWS], tl.float32)
    # A bound that ptxas cannot see: it unrolls known ones, for up to 9 seconds a kernel.
    for k in range(0, width, BLOCK_K):
        if EVEN:
            x_tile = tl.load(x_at)
            w_tile = tl.load(w_at)
        elif SWAP:
            inside = k + depth < WIDTH
            x_tile = tl.load(x_at, mask=inside[:, None], other=0.0)
            w_tile = tl.load(w_at, mask=exists[:, None] & inside[None, :], other=0.0)
        else:
            inside = k + depth < WIDTH
            x_tile = tl.load(x_at, mask=inside[None, :], other=0.0)
            w_tile = tl.load(w_at, mask=exists[None, :] & inside[:, None], other=0.0)
        if SWAP:
            total = tl.dot(w_tile, x_tile, total, input_precision="ieee")
        else:
            total = tl.dot(x_tile, w_tile, total, input_precision="ieee")
        x_at += BLOCK_K
        w_at += BLOCK_K * w_column
    if SWAP:
        total = tl.trans(total)

    if HAS_BIAS:
        TALL: tl.constexpr = COLUMNS * 2 if GATED else COLUMNS
        shift = tl.load(bias + expert * TALL + row, mask=exists, other=0.0).to(tl.float32)
        total += shift[None, :]
    narrow = out.dtype.element_ty
    if GATED:
        total = total.to(narrow).to(tl.float32)
        if PAIRED:
            gates, others = tl.split(tl.reshape(total, (BLOCK_M, BLOCK_N, 2)))
        else:
            halves = tl.reshape(total, (BLOCK_M, 2, BLOCK_N))
            gates, others = tl.split(tl.permute(halves, (0, 2, 1)))
        result = gated(gates, others, ACTIVATION, LIMIT, ALPHA, narrow)
    elif ACTIVATION != "":
        result = activate(total.to(narrow).to(tl.float32), ACTIVATION, narrow)
    else:
        result = total
    column = start + tl.arange(0, BLOCK_N)
    place = out + (slot.to(tl.int64)[:, None] * COLUMNS + column[None, :])
    tl.store(place, result.to(narrow), mask=taken[:, None] & (column < COLUMNS)[None, :])


@triton.jit(do_not_specialize=["pairs"])
def block_product_kernel(
    x,
    weight,
    bias,
    out,
    slots,
    block_expert,
    block_count,
    pairs,
    width,
    x_stride,
    w_expert,
    w_row,
    w_column,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
    HALVES: tl.constexpr,
    KNOWN: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[p] = activation(weight[expert of p] @ x[p // CHOICES] + bias): one block of pairs each.

    x [.., WIDTH], out [pairs, COLUMNS] without gaps, weight [E, COLUMNS or 2 * COLUMNS, WIDTH] by
    its strides; width is WIDTH. slots [blocks * BLOCK_M] int32: the pairs of each block, `pairs`
    where there is none. ACTIVATION: "" for none. SWAP: the weights are the left operand, whose
    rows fill a tensor core's 64 better than a few tokens do. HALVES: of a block that has no pairs
    in its second half only the first is computed. KNOWN: the kernel in front is a product over the
    same blocks, not what sorted them; then weights are asked for before the wait, EARLY bytes of
    each row.
    """
    if PDL and not KNOWN:
        tl.extra.cuda.gdc_wait()
        # Only now: a kernel that starts from here on may read the sorted pairs before it waits.
        tl.extra.cuda.gdc_launch_dependents()
    # Not from L1 before the wait: it may hold what was here in an earlier layer.
    blocks = tl.load(block_count, cache_modifier=".cg")
    COLUMN_BLOCKS: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    if program >= blocks * COLUMN_BLOCKS:
        if PDL and KNOWN:
            tl.extra.cuda.gdc_wait()
        return
    # GROUP blocks share a column's weights, and all columns share the group's rows, in L2.
    first = program // (GROUP * COLUMN_BLOCKS) * GROUP
    group = tl.minimum(blocks - first, GROUP)
    within = program % (GROUP * COLUMN_BLOCKS)
    block = first + within % group
    start = within // group * BLOCK_N

    slots += block * BLOCK_M
    slot = tl.load(slots + tl.arange(0, BLOCK_M), cache_modifier=".cg")
    expert = tl.load(block_expert + block, cache_modifier=".cg").to(tl.int64)
    full = True
    if HALVES:
        # Slots are taken one after the other.
        full = tl.load(slots + BLOCK_M // 2, cache_modifier=".cg") < pairs
    weight += expert * w_expert
    if PDL and KNOWN:
        if EARLY > 0:
            prefetch(weight, start, COLUMNS, WIDTH, BLOCK_N, EARLY)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if full:
        multiply_block(
            x, weight, bias, out, slot, expert, start, pairs, width, x_stride, w_row, w_column,
            CHOICES, WIDTH, COLUMNS, GATED, INTERLEAVED, PAIRED, ACTIVATION, LIMIT, ALPHA, HAS_BIAS,
            BLOCK_M, BLOCK_N, BLOCK_K, SWAP,
        )  # fmt: skip
    elif HALVES:
        few = tl.load(slots + tl.arange(0, BLOCK_M // 2), cache_modifier=".cg")
        multiply_block(
            x, weight, bias, out, few, expert, start, pairs, width, x_stride, w_row, w_column,
            CHOICES, WIDTH, COLUMNS, GATED, INTERLEAVED, PAIRED, ACTIVATION, LIMIT, ALPHA, HAS_BIAS,
            BLOCK_M // 2, BLOCK_N, BLOCK_K, SWAP,
        )  # fmt: skip


@triton.jit
def sum_choices_kernel(
    hidden,
    index,
    weights,
    residual,
    out,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """hidden [T * CHOICES, WIDTH], index and weights [T, CHOICES] -> out [T, WIDTH].

    Adds residual [T, WIDTH] before the sum is rounded. Rows whose index is no expert here were
    never written and are not read. The kernel in front is the product that makes hidden.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    choice = tl.arange(0, BLOCK_C)
    pair = token * CHOICES + choice
    # Before the wait: that product let this start after it had waited itself, so all that came
    # before it is done. Not from L1, which may hold what was here in an earlier layer.
    expert = tl.load(index + pair, mask=choice < CHOICES, other=-1, cache_modifier=".cg")
    here = (expert >= 0) & (expert < EXPERTS)
    share = tl.load(weights + pair, mask=here, other=0.0, cache_modifier=".cg").to(tl.float32)
    other = tl.zeros([BLOCK], tl.float32)
    if HAS_RESIDUAL:
        place = residual + token * WIDTH + column
        other = tl.load(place, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    rows = hidden + pair[:, None] * WIDTH + column[None, :]
    row = tl.load(rows, mask=here[:, None] & inside[None, :], other=0.0).to(tl.float32)
    part = row * share[:, None]
    if hidden.dtype.element_ty == weights.dtype.element_ty:
        part = part.to(hidden.dtype.element_ty).to(tl.float32)
    total = tl.sum(part, axis=0) + other
    tl.store(out + token * WIDTH + column, total.to(out.dtype.element_ty), mask=inside)
