"""Kernels that sort pairs of a token and a choice by expert, into blocks of one expert each.

Counts per expert, rounded up to whole blocks and summed, say where each expert's blocks start. Of
many pairs each then draws a slot from a counter per expert, in any order: a row's result is the
same wherever it is. Few pairs are counted again for every expert, which waits for nothing.
"""

import triton
import triton.language as tl


@triton.jit
def _experts_of(index, offset, pairs, EXPERTS: tl.constexpr):
    """Experts of the pairs at `offset` as int32; EXPERTS for one that is not here."""
    expert = tl.load(index + offset, mask=offset < pairs, other=EXPERTS)
    here = (expert >= 0) & (expert < EXPERTS)
    return tl.where(here, expert, EXPERTS).to(tl.int32)


@triton.jit
def _blocks_of(counts, EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Blocks that each expert [BINS] needs."""
    needed = (counts + BLOCK_M - 1) // BLOCK_M
    return tl.where(tl.arange(0, BINS) < EXPERTS, needed, 0)


@triton.jit
def _lay_out(
    tile, ends, slots, block_expert, pairs, max_blocks, BLOCK_M: tl.constexpr, TILE: tl.constexpr
):
    """Names the expert of each of TILE blocks and empties their slots."""
    block = tile * TILE + tl.arange(0, TILE)
    expert = tl.sum((ends[None, :] <= block[:, None]).to(tl.int32), axis=1)
    tl.store(block_expert + block, expert, mask=block < max_blocks)
    slot = tile * TILE * BLOCK_M + tl.arange(0, TILE * BLOCK_M)
    empty = tl.zeros([TILE * BLOCK_M], tl.int32) + pairs
    tl.store(slots + slot, empty, mask=slot < max_blocks * BLOCK_M)


@triton.jit
def _take_slots(expert, offset, cursor, slots, EXPERTS: tl.constexpr):
    here = expert < EXPERTS
    slot = tl.atomic_add(cursor + expert, 1, mask=here, sem="relaxed")
    tl.store(slots + slot, offset, mask=here)


@triton.jit(do_not_specialize=["pairs"])
def sort_few_kernel(
    index,
    slots,
    block_expert,
    block_count,
    pairs,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """All in one launch, for at most CHUNK pairs: a program per expert counts all of them.

    index [pairs]; slots, block_expert and block_count [1] int32 are written as far as there are
    blocks. BINS: a power of two above EXPERTS. Pairs of an expert keep their order.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    own = tl.program_id(0)
    offset = tl.arange(0, CHUNK)
    expert = _experts_of(index, offset, pairs, EXPERTS)
    blocks = _blocks_of(tl.histogram(expert, BINS), EXPERTS, BINS, BLOCK_M)
    bins = tl.arange(0, BINS)
    if own == 0:
        tl.store(block_count, tl.sum(blocks, axis=0))
    first = tl.sum(tl.where(bins < own, blocks, 0), axis=0)
    needed = tl.sum(tl.where(bins == own, blocks, 0), axis=0)
    if needed > 0:
        mine = (expert == own).to(tl.int32)
        place = tl.cumsum(mine, axis=0)
        slots += first * BLOCK_M
        tl.store(slots + place - 1, offset, mask=mine > 0)
        empty = tl.sum(mine, axis=0) + tl.arange(0, BLOCK_M)
        nothing = tl.zeros([BLOCK_M], tl.int32) + pairs
        tl.store(slots + empty, nothing, mask=empty < needed * BLOCK_M)
        block = tl.arange(0, CHUNK // BLOCK_M)
        names = tl.zeros([CHUNK // BLOCK_M], tl.int32) + own
        tl.store(block_expert + first + block, names, mask=block < needed)


@triton.jit(do_not_specialize=["pairs"])
def count_kernel(
    index,
    counts,
    pairs,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """counts [programs, BINS] int32: pairs per expert in each chunk."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    chunk = tl.program_id(0)
    expert = _experts_of(index, chunk * CHUNK + tl.arange(0, CHUNK), pairs, EXPERTS)
    tl.store(counts + chunk * BINS + tl.arange(0, BINS), tl.histogram(expert, BINS))


@triton.jit(do_not_specialize=["chunks", "pairs", "max_blocks"])
def lay_out_kernel(
    counts,
    slots,
    block_expert,
    block_count,
    cursor,
    chunks,
    pairs,
    max_blocks,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    ROUNDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Says where each expert's blocks are and empties them; one program per TILE blocks.

    slots [max_blocks * BLOCK_M], block_expert [max_blocks], block_count [1] and cursor [BINS] int32
    are written. ROUNDS * 16 chunks at least.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    bins = tl.arange(0, BINS)
    total = tl.zeros([BINS], tl.int32)
    for turn in range(ROUNDS):
        chunk = turn * 16 + tl.arange(0, 16)
        place = counts + chunk[:, None] * BINS + bins[None, :]
        total += tl.sum(tl.load(place, mask=(chunk < chunks)[:, None], other=0), axis=0)
    blocks = _blocks_of(total, EXPERTS, BINS, BLOCK_M)
    ends = tl.cumsum(blocks, axis=0)
    tile = tl.program_id(0)
    if tile == 0:
        tl.store(cursor + bins, (ends - blocks) * BLOCK_M)
        tl.store(block_count, tl.sum(blocks, axis=0))
    _lay_out(tile, ends, slots, block_expert, pairs, max_blocks, BLOCK_M, TILE)


@triton.jit(do_not_specialize=["pairs"])
def take_slots_kernel(
    index,
    cursor,
    slots,
    pairs,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each pair draws a slot from its expert's counter; one program per CHUNK pairs."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    offset = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    _take_slots(_experts_of(index, offset, pairs, EXPERTS), offset, cursor, slots, EXPERTS)
