"""A decoding step's attention in one launch: heads turned, written to pages and attended to.

For steps with as many tokens as sequences; the kernel says why. What such a step does not change
is read before the kernel in front has ended: lengths, tables and slots are copied before a step
begins, earlier keys and values were written by earlier steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import gpu
from ..rope.triton_rope import PLAIN, HeadNorm
from .triton_paged import Form, overlap, scratch, triton_block

LARGEST = 8192
"""Numbers of the queries of one kv head that a program can hold and turn in registers."""


@dataclass(frozen=True)
class Tiles:
    """How one launch is cut up."""

    keys: int
    """Keys of one block; two blocks of them and of values are in registers."""
    least: int
    """Blocks a range has at least, before a sequence is cut into ranges at all."""
    programs: int
    """A sequence is cut as long as the launch stays within this number of programs."""
    warps: int
    registers: int = 0
    """Most registers of a thread; 0 leaves it to the compiler."""
    merge: int = 64
    """Numbers of the ranges that a thread has on their way to it when it adds them up."""


@dataclass(frozen=True)
class Turn:
    """What is done to heads first: norms, and a rotation if there is a table."""

    norm: HeadNorm = PLAIN
    cos: torch.Tensor | None = None
    """[1, T, R], as sin"""
    sin: torch.Tensor | None = None
    interleaved: bool = False


PLAIN_TURN = Turn()


def tiles(width: int, itemsize: int, group: int, heads: int, device: torch.device) -> Tiles:
    """Tiles for `group` query heads a kv head in a cache of `itemsize` bytes a number.

    width: of a head, a power of 2. heads: of keys, of all sequences together.
    """
    rows = triton_block(group, 8)
    multiprocessors = gpu.multiprocessors(device.index or 0)
    # Ranges are cut so that all programs are there at once: with 16 KiB of keys and of values and
    # some 230 registers a thread two share a multiprocessor, of half as many keys and 168 three. In
    # us on an H200, 576 keys of 4 and of 8 heads of 128: 8 warps 3.9 and 4.6, 4 warps 5.2 and 5.3.
    if heads > multiprocessors:
        block, share, warps, registers = 16384, 4, 4, 0
    elif heads * 8 > multiprocessors:
        block, share, warps, registers = 8192, 3, 4, 168
        if width > 128:
            share, registers = 2, 0
    elif width <= 128:
        block, share, warps, registers = 16384, 2, 8, 0
    else:
        # Four warps have no registers for heads as wide as these and what they are turned with.
        block, share, warps, registers = 32768, 1, 8, 0
    keys = max(16, min(128, block // (width * itemsize), 4096 // rows))
    # With few sequences the meeting of ranges is a wait: all of them are asked for at once.
    merge = 64 if heads * 8 > multiprocessors else 128
    warps = 8 if rows * width > 4096 else warps
    return Tiles(keys, 1, share * multiprocessors, warps, registers, merge=merge)


def holds(q: torch.Tensor, k: torch.Tensor, sequences: int) -> bool:
    """Whether `decode_heads` takes a step of q [T, Hq, D] and k [T, Hkv, D].

    Up to two heads a multiprocessor, and fewer of those wider than 128. With more of them the
    loop of `decode_kernel`, whose keys come through shared memory, is nearer to the memory's speed.
    In us on an H200, 64 sequences of 576 keys: 4 heads of 128 take 30.5 here, 38.8 there and in the
    launch that turns heads; 8 heads 59 and 44; 2 heads of 256 took 50 here, 18 are their bytes.
    """
    width = triton_block(q.shape[2], 16)
    rows = triton_block(q.shape[1] // k.shape[1], 8)
    room = gpu.multiprocessors(q.device.index or 0)
    few = sequences * k.shape[1] <= (2 * room if width <= 128 else room * 128 // width)
    return len(q) == sequences and few and rows * width <= LARGEST


def decode_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cu_q: torch.Tensor,
    kv_len: torch.Tensor,
    block_table: torch.Tensor,
    slot: torch.Tensor,
    form: Form,
    turn: Turn = PLAIN_TURN,
    cut: Tiles | None = None,
) -> torch.Tensor:
    """Turns q and k, writes k and v at their slots and attends: [T, Hq, Dv].

    q [T, Hq, D], k [T, Hkv, D] and v [T, Hkv, Dv] with any strides but the last, which is 1; as
    many tokens as sequences, mostly one each. Rows of tokens that no sequence owns may be
    anything. As `attend_pages`, not for two streams at a time.
    """
    from .rotary_decode_kernel import rotary_decode_kernel

    q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k, v))
    tokens, heads, width = q.shape
    page_size, kv_heads, value_width = k_cache.shape[1], k_cache.shape[2], v_cache.shape[3]
    out = q.new_empty((tokens, heads, value_width))
    if not out.numel():
        return out
    group, norm, pdl = heads // kv_heads, turn.norm, gpu.overlaps_launches()
    block_d, block_dv = triton_block(width, 16), triton_block(value_width, 16)
    cut = cut or tiles(max(block_d, block_dv), q.element_size(), group, tokens * kv_heads, q.device)
    ranges = -(-form.visible(block_table.shape[1] * page_size) // (cut.keys * cut.least))
    splits = max(1, min(ranges, cut.programs // (tokens * kv_heads)))
    met = (q, q, q)  # never touched
    if splits > 1:
        met = scratch(q.device, cut.programs, group, value_width)
    merged = min(triton_block(group), max(1, 2048 // block_dv))
    together = min(triton_block(splits), 32 * cut.warps * cut.merge // (merged * block_dv))
    cos, sin = (
        q if t is None else t if t.stride(2) == 1 else t.contiguous() for t in (turn.cos, turn.sin)
    )
    rotary_decode_kernel[(kv_heads, tokens, splits)](
        q, k, v, k_cache, v_cache, out, cu_q, kv_len, block_table, slot, cos, sin,
        q if norm.q_weight is None else norm.q_weight,
        q if norm.k_weight is None else norm.k_weight, *form.tensors, *met,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3],
        *v_cache.stride()[:3], block_table.stride(0), slot.stride(0), cos.stride(1), sin.stride(1),
        tokens, block_table.shape[1], splits, cut.least, *form.numbers,
        norm.q_eps or 0.0, norm.k_eps or 0.0, norm.offset,
        HKV=kv_heads, GROUP=group, D=width, DV=value_width, PAGE=page_size,
        BLOCK_G=triton_block(group, 8), BLOCK_N=cut.keys, BLOCK_D=block_d, BLOCK_DV=block_dv,
        HALF=0 if turn.cos is None else turn.cos.shape[2] // 2, INTERLEAVED=turn.interleaved,
        Q_NORM=norm.q_eps is not None, K_NORM=norm.k_eps is not None,
        Q_WEIGHT=norm.q_weight is not None, K_WEIGHT=norm.k_weight is not None,
        FIRST=norm.cast_before_weight, **form.flags, SPLIT=splits > 1, MERGE_G=merged,
        MERGE_S=max(2, together),
        PRECISION="tf32x3" if q.dtype is torch.float32 else "tf32", PDL=pdl, num_warps=cut.warps,
        num_stages=1, **overlap(pdl), **({"maxnreg": cut.registers} if cut.registers else {}),
    )  # fmt: skip
    return out
