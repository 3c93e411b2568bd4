"""Kernels that prepare a step's inputs.

They are launched without overlap: kernels of the model read these inputs before they wait.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def resolve_tokens_kernel(input_ids, tokens, out, count, BLOCK: tl.constexpr):
    """out[i] = input_ids[i], or tokens[-1 - input_ids[i]] where that is negative."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    ids = tl.load(input_ids + at, mask=inside, other=0)
    missing = inside & (ids < 0)
    found = tl.load(tokens + (-1 - ids), mask=missing, other=0)
    tl.store(out + at, tl.where(missing, found, ids), mask=inside)


@triton.jit(do_not_specialize=["count"])
def relay_tokens_kernel(tokens, slots, newest, count, BLOCK: tl.constexpr):
    """newest[slots[i]] = tokens[i], or 0 where that is negative."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    token = tl.load(tokens + at, mask=inside, other=0)
    slot = tl.load(slots + at, mask=inside, other=0)
    tl.store(newest + slot, tl.where(token < 0, 0, token), mask=inside)


@triton.jit(do_not_specialize=["turns", "width", "count", "stride"])
def open_step_kernel(
    letters, turn, newest, out, lengths_out, pages_out, turns, width, count, stride,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: reads letter turn + 1 of `turns`, [4 + GROUPS, width] int32 each.

    out [4, stride] int64: ids, positions, known lengths, slots; lengths_out [count] and pages_out
    [GROUPS, stride] int32. ROWS: GROUPS as a power of two.
    """
    following = (tl.load(turn) + 1) % turns
    at = tl.arange(0, BLOCK)
    inside = at < count
    letter = letters + following * (4 + GROUPS) * width
    # All is asked for before any is used: each is a round trip to the host's memory.
    slots = tl.load(letter + at, mask=inside, other=0)
    positions = tl.load(letter + width + at, mask=inside, other=0)
    ids = tl.load(letter + 2 * width + at, mask=inside, other=0).to(tl.int64)
    lengths = tl.load(letter + 3 * width + at, mask=inside, other=0)
    if GROUPS > 0:
        group = tl.arange(0, ROWS)[:, None]
        wanted = (group < GROUPS) & inside[None, :]
        pages = tl.load(letter + (4 + group) * width + at[None, :], mask=wanted, other=0)
        tl.store(pages_out + group * stride + at[None, :], pages, mask=wanted)
    missing = inside & (ids < 0)
    found = tl.load(newest + (-1 - ids), mask=missing, other=0)
    tl.store(out + at, tl.where(missing, found, ids), mask=inside)
    tl.store(out + stride + at, positions.to(tl.int64), mask=inside)
    known = tl.maximum(lengths, positions + 1)
    tl.store(out + 2 * stride + at, known.to(tl.int64), mask=inside)
    tl.store(out + 3 * stride + at, slots.to(tl.int64), mask=inside)
    tl.store(lengths_out + at, positions + 1, mask=inside)
    # Every thread has read the old number before one writes the new.
    tl.debug_barrier()
    tl.store(turn, following)


@triton.jit(do_not_specialize=["width"])
def place_pages_kernel(
    table, rows, pages, slots, positions, places, width, PAGE: tl.constexpr, BLOCK: tl.constexpr
):
    """Program b: sets the page of one sequence's new token, and copies its row up to there."""
    sequence = tl.program_id(0)
    page = tl.load(pages + sequence)
    position = tl.load(positions + sequence)
    source = table + tl.load(slots + sequence) * width
    target = rows + sequence.to(tl.int64) * width
    last = (position // PAGE).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    for start in tl.range(0, last + 1, BLOCK):
        column = start + lane
        held = tl.load(source + column, mask=column < last, other=0)
        tl.store(target + column, tl.where(column == last, page, held), mask=column <= last)
    tl.store(source + last, page)
    tl.store(places + sequence, page.to(tl.int64) * PAGE + position % PAGE)
