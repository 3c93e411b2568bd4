"""Kernels of argmax_rows."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["vocab", "per_part", "parts"])
def best_of_parts_kernel(
    logits, values, places, vocab, row_stride, per_part, parts, BLOCK: tl.constexpr
):
    """The largest of each part of each row, +inf if the part has NaN, and where it first is."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    start = part * per_part * BLOCK
    offsets = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    place = tl.full([BLOCK], 0, tl.int32)
    turn = 0
    while turn < per_part:
        at = start + turn * BLOCK + offsets
        found = tl.load(logits + row * row_stride + at, mask=at < vocab, other=float("-inf"))
        found = found.to(tl.float32)
        found = tl.where(found == found, found, float("inf"))
        larger = found > best
        best = tl.where(larger, found, best)
        place = tl.where(larger, at, place)
        turn += 1
    largest = tl.max(best, axis=0)
    first = tl.min(tl.where(best == largest, place, 2147483647), axis=0)
    tl.store(values + row * parts + part, largest)
    tl.store(places + row * parts + part, first)


@triton.jit(do_not_specialize=["parts"])
def best_of_row_kernel(values, places, out, parts, PARTS: tl.constexpr):
    """The best of a row's parts; -1 if it is not finite."""
    row = tl.program_id(0)
    at = tl.arange(0, PARTS)
    inside = at < parts
    found = tl.load(values + row * parts + at, mask=inside, other=float("-inf"))
    place = tl.load(places + row * parts + at, mask=inside, other=2147483647)
    largest = tl.max(found, axis=0)
    first = tl.min(tl.where(found == largest, place, 2147483647), axis=0)
    finite = (largest < float("inf")) & (largest > float("-inf"))
    tl.store(out + row, tl.where(finite, first, -1).to(tl.int64))
