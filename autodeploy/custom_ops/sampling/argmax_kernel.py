"""Kernels of argmax_rows: parts of rows first, then the best of each row's parts."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["blocks"])
def argmax_part_kernel(
    logits,
    values,
    ids,
    vocab,
    stride,
    blocks,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row, part) looks at `blocks` consecutive blocks; NaN counts as +inf.

    Writes values[row, part] float32 and ids[row, part] int32, contiguous.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = tl.zeros([BLOCK], tl.int32)
    start = part * blocks * BLOCK
    end = tl.minimum(start + blocks * BLOCK, vocab)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for at in tl.range(start, end, BLOCK, num_stages=STAGES):
        column = at + lane
        inside = column < vocab
        x = tl.load(logits + row * stride + column, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(x != x, float("inf"), x)
        x = tl.where(inside, x, float("-inf"))
        better = x > best
        best = tl.where(better, x, best)
        best_id = tl.where(better, column, best_id)
    top = tl.max(best, 0)
    first = tl.min(tl.where(best == top, best_id, 2147483647), 0)
    place = row * tl.num_programs(1) + part
    tl.store(values + place, top)
    tl.store(ids + place, first)


@triton.jit(do_not_specialize=["parts", "width"])
def argmax_merge_kernel(
    values,
    ids,
    tokens,
    slots,
    turn,
    newest,
    answers,
    parts,
    width,
    BLOCK: tl.constexpr,
    RELAY: tl.constexpr,
    PDL: tl.constexpr,
):
    """tokens[row] int64: the id of the first of the largest of a row's parts; -1 if not finite.

    RELAY: also newest[slots[row]], 0 for -1, and answers[turn, row] of rows of `width`, which may
    be memory of the host. Without it these five are not looked at.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    inside = part < parts
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    value = tl.load(values + row * parts + part, mask=inside, other=float("-inf"))
    found = tl.load(ids + row * parts + part, mask=inside, other=2147483647)
    top = tl.max(value, 0)
    token = tl.min(tl.where(value == top, found, 2147483647), 0).to(tl.int64)
    usable = (top > float("-inf")) & (top < float("inf"))
    token = tl.where(usable, token, -1)
    tl.store(tokens + row, token)
    if RELAY:
        tl.store(newest + tl.load(slots + row), tl.maximum(token, 0))
        tl.store(answers + tl.load(turn) * width + row, token)
