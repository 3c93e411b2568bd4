"""Pairs of a token and a choice, sorted by expert on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import gpu

# Up to the last number of pairs one launch sorts them, with a kernel for each number.
_FEW = (256, 1024, 2048, 4096)
# A program per expert has a multiprocessor to itself: pairs per warp are few.
_PAIRS_PER_WARP = 512
_CHUNK = 2048
_TILE = 32


@dataclass(frozen=True)
class SortedPairs:
    """Blocks of `rows` slots, each of one expert; its last slots may be empty.

    slots [max_blocks * rows] int32: a pair, or the number of pairs where there is none;
    block_expert [max_blocks] and block_count [1] int32: only the first block_count blocks count.
    """

    slots: torch.Tensor
    block_expert: torch.Tensor
    block_count: torch.Tensor
    rows: int
    max_blocks: int


def most_blocks(pairs: int, experts: int, rows: int) -> int:
    """The most blocks of `rows` that `pairs` can need: every expert hit has one partly empty."""
    return min(pairs, (pairs + min(pairs, experts) * (rows - 1)) // rows)


def sort_pairs(index: torch.Tensor, experts: int, rows: int) -> SortedPairs:
    """index [T, k] without gaps; pairs whose index is no expert are in no block."""
    from .sort_kernel import count_kernel, lay_out_kernel, sort_few_kernel, take_slots_kernel

    pairs = index.numel()
    bins = 1 << experts.bit_length()
    blocks = most_blocks(pairs, experts, rows)
    # One allocation: slots, experts of blocks, the number of blocks, counters.
    sizes = (blocks * rows, blocks, 1, bins)
    whole = torch.empty(sum(sizes), dtype=torch.int32, device=index.device)
    slots, block_expert, block_count, cursor = whole.split(sizes)
    pdl = gpu.overlaps_launches()
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    if pairs <= _FEW[-1]:
        chunk = next(most for most in _FEW if pairs <= most)
        sort_few_kernel[(experts,)](
            index, slots, block_expert, block_count, pairs, EXPERTS=experts, BINS=bins,
            BLOCK_M=rows, CHUNK=chunk, PDL=pdl,
            num_warps=min(16, max(4, chunk // _PAIRS_PER_WARP)), **options,
        )  # fmt: skip
        return SortedPairs(slots, block_expert, block_count, rows, blocks)
    chunks = -(-pairs // _CHUNK)
    counts = torch.empty((chunks, bins), dtype=torch.int32, device=index.device)
    count_kernel[(chunks,)](
        index, counts, pairs, EXPERTS=experts, BINS=bins, CHUNK=_CHUNK, PDL=pdl, num_warps=8,
        **options,
    )  # fmt: skip
    lay_out_kernel[(-(-blocks // _TILE),)](
        counts, slots, block_expert, block_count, cursor, chunks, pairs, blocks,
        EXPERTS=experts, BINS=bins, BLOCK_M=rows, TILE=_TILE,
        ROUNDS=-(-(1 << (chunks - 1).bit_length()) // 16), PDL=pdl, num_warps=8, **options,
    )  # fmt: skip
    take_slots_kernel[(-(-pairs // 256),)](
        index, cursor, slots, pairs, EXPERTS=experts, CHUNK=256, PDL=pdl, num_warps=4, **options,
    )  # fmt: skip
    return SortedPairs(slots, block_expert, block_count, rows, blocks)
