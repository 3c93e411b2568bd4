"""paged_attention in Triton: reads keys and values where they lie, in their pages.

Two kernels. Where a sequence brings one token its keys are cut into ranges, so that a few long
sequences fill the device as well as many short ones (Flash-Decoding, Dao et al., 2023). Where it
brings more, blocks of queries go over their keys, as in FlashAttention-2 (Dao, 2023). A step with
as many tokens as sequences is launched as the first alone, any other as both, and each leaves the
other's sequences alone. Of the former, all but the widest go to `triton_decode` instead, a single
launch with the writing of keys. Every grid is known from shapes: a CUDA graph holds the launches,
the lengths stay on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from .. import gpu
from ..op import Choice
from .paged_attention import paged_attention

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
METADATA = {
    "cu_q": torch.int32, "kv_len": torch.int32, "block_table": torch.int32, "slot": torch.int64,
}  # fmt: skip


@dataclass(frozen=True)
class DecodeTiles:
    """How one launch for one token a sequence is cut up."""

    keys: int
    """Keys of one block."""
    least: int
    """Blocks a range has at least, before a sequence is cut into ranges at all."""
    programs: int
    """A sequence is cut as long as the launch stays within this number of programs."""
    warps: int
    stages: int
    known: bool = False
    """Whether a block's pages are read one block ahead. Else every other stage is theirs: of 2 to 4
    stages one block of keys is on its way, of 5 two; known, of 3 two and of 4 three."""


@dataclass(frozen=True)
class PrefillTiles:
    """How one launch for any number of tokens a sequence is cut up."""

    rows: int
    """Rows of one block, tokens times heads of a group."""
    keys: int
    warps: int
    stages: int
    registers: int = 0
    """Most registers of a thread; 0 leaves it to the compiler. 128 let two blocks of 8 warps share
    a multiprocessor, one multiplies while the other takes powers."""


def decode_tiles(
    width: int, itemsize: int, group: int, heads: int, device: torch.device
) -> DecodeTiles:
    """Tiles for `group` query heads a kv head in a cache of `itemsize` bytes a number.

    width: of a head, a power of 2. heads: of keys, of all sequences together.
    """
    rows = triton_block(group, 16)
    programs = 3 * gpu.multiprocessors(device.index or 0)
    # Few programs need much on its way in each. In us on an H200, with 16 KiB of keys and four
    # stages for all before: 256 heads of 128 and 576 keys 24 (27), 192 of 4096 keys 101 (132). More
    # keep the memory busy with two stages: 2048 of 576 keys 146 (148). Many are best off with few
    # threads each: 1024 of them 78 (83), of heads of 64 2048 80 (86).
    warps = 8 if rows > 32 else 4
    if width * itemsize > 256:
        # Blocks of 8 KiB would have 16 keys: with them a step of 34 layers, 64 sequences of 576 and
        # 4 heads of 256 took 0.6 ms longer than with 32 keys and four stages.
        # Few programs again: 64 sequences, 2 and 4 heads of 256 27 (40) and 43 (58).
        block, stages = 16384, 4
        if heads <= programs // 3 * 2 and width * itemsize == 512:
            warps = 8 if heads <= programs // 3 or rows > 32 else warps
            return DecodeTiles(64, 1, programs // 3 * 2, warps, 3 if warps == 8 else 2, known=True)
    elif heads <= programs:
        block, stages = 8192, 5
    elif heads > 2 * programs and rows == 16:
        block, stages, warps = 8192, 4, 2
    else:
        block, stages = 16384, 2
    keys = max(16, min(128, block // (width * itemsize), 4096 // rows))
    return DecodeTiles(keys, max(1, 64 // keys), programs, warps, stages)


def prefill_tiles(width: int, itemsize: int, group: int, tokens: int) -> PrefillTiles:
    """Tiles for `group` query heads a kv head and, on average, `tokens` tokens a sequence.

    The others as in `decode_tiles`.
    """
    if itemsize == 4:
        rows = triton_block(group, 8192 // width)
        return PrefillTiles(rows, max(16, 4096 // max(width, rows)), 8 if rows > 64 else 4, 2)
    if tokens < 64:
        # 255 single tokens beside a prompt of 500: 189 us, with 128 rows 299.
        return PrefillTiles(64, 64, 4, 3 if width < 256 else 2)
    # 8 x 1024 and 1 x 8192 tokens, heads of 128: 289 and 434 TFLOP/s; 8 warps 249 and 330.
    return PrefillTiles(128, 64, 4 if width == 128 else 8, 3 if width < 256 else 2)


def triton_block(extent: int, least: int = 1) -> int:
    """Smallest power of 2 that holds `extent`, at least `least`."""
    return max(least, 1 << (extent - 1).bit_length())


def attend_pages(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cu_q: torch.Tensor,
    kv_len: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """`paged_attention` once keys and values are written: [T, Hq, Dv].

    q [T, Hq, D] with any strides but the last, which is 1; cu_q, kv_len [B] and block_table
    [B, W] int32; the block table may hold anything after the pages of kv_len; `scale` is above 0.
    Rows of the result that no sequence owns, from cu_q[B] on, are zeros, but where T is B: there
    they are not written. Not for two streams at a time: the ranges of a sequence meet in memory
    that launches share.
    """
    if q.stride(2) != 1:
        q = q.contiguous()
    out = q.new_empty((q.shape[0], q.shape[1], v_cache.shape[3]))
    if not out.numel() or not len(kv_len):
        return out
    site = _Site.of(q, k_cache, v_cache, cu_q, kv_len, block_table, out)
    form = Form.of(scale, window, chunk, softcap, sinks, alibi_slopes, q)
    size = q.element_size()
    heads = site.sequences * site.heads
    launch_decode(site, form, decode_tiles(site.width, size, site.group, heads, q.device))
    if len(q) != len(kv_len):
        tokens = len(q) // len(kv_len)
        launch_prefill(site, form, prefill_tiles(site.width, size, site.group, tokens))
    return out


@dataclass(frozen=True)
class _Site:
    """What is attended to by what, and where."""

    q: torch.Tensor
    out: torch.Tensor
    addresses: tuple[torch.Tensor, ...]
    """q, k_cache, v_cache, out, cu_q, kv_len, block_table"""
    strides: tuple[int, ...]
    sequences: int
    heads: int
    """Of keys and values."""
    group: int
    longest: int
    """No sequence has more keys."""
    shape: dict[str, Any]
    width: int
    """The wider of a key's and a value's block."""

    @classmethod
    def of(
        cls, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, cu_q: torch.Tensor,
        kv_len: torch.Tensor, block_table: torch.Tensor, out: torch.Tensor,
    ) -> _Site:  # fmt: skip
        page_size, heads = k_cache.shape[1], k_cache.shape[2]
        group = q.shape[1] // heads
        block_d, block_dv = triton_block(q.shape[2], 16), triton_block(out.shape[2], 16)
        shape = {
            "HKV": heads, "GROUP": group, "D": q.shape[2], "DV": out.shape[2], "PAGE": page_size,
            "BLOCK_D": block_d, "BLOCK_DV": block_dv,
            "PRECISION": "tf32x3" if q.dtype is torch.float32 else "tf32",
        }  # fmt: skip
        strides = (q.stride(0), q.stride(1), *k_cache.stride()[:3], *v_cache.stride()[:3])
        return cls(
            q, out, (q, k_cache, v_cache, out, cu_q, kv_len, block_table),
            (*strides, block_table.stride(0)), len(kv_len), heads, group,
            block_table.shape[1] * page_size, shape, max(block_d, block_dv),
        )  # fmt: skip


@dataclass(frozen=True)
class Form:
    """What is done to scores, as arguments and constants of the kernels."""

    tensors: tuple[torch.Tensor, torch.Tensor]
    """Sinks and slopes; where there are none, anything."""
    numbers: tuple[float, float, float, int, int]
    flags: dict[str, bool]

    @classmethod
    def of(
        cls, scale: float, window: int, chunk: int, softcap: float, sinks: torch.Tensor | None,
        alibi_slopes: torch.Tensor | None, other: torch.Tensor,
    ) -> Form:  # fmt: skip
        # A plain product becomes a power of 2 with one multiplication and addition, `unit` times
        # the score less the largest; what changes scores brings them to that unit itself.
        plain = not softcap and alibi_slopes is None
        unit = scale / math.log(2) if plain else 1.0
        return cls(
            (
                other if sinks is None else sinks.contiguous(),
                other if alibi_slopes is None else alibi_slopes.contiguous(),
            ),
            (scale, unit, softcap, window, chunk),
            {
                "WINDOW": window > 0, "CHUNK": chunk > 0, "SOFTCAP": softcap > 0,
                "ALIBI": alibi_slopes is not None, "SINKS": sinks is not None,
            },
        )  # fmt: skip

    def visible(self, longest: int) -> int:
        """Most keys one query sees of `longest`."""
        window, chunk = self.numbers[3:]
        return min(longest, window or longest, chunk or longest)


def launch_decode(site: _Site, form: Form, tiles: DecodeTiles) -> None:
    """Single tokens: a program for each range of keys of each sequence and kv head.

    All tokens if there are as many as sequences, else those that are their sequence's only one.
    """
    from .paged_attention_kernel import decode_kernel

    rows = site.sequences * site.heads
    ranges = -(-form.visible(site.longest) // (tiles.keys * tiles.least))
    splits = max(1, min(ranges, tiles.programs // rows))
    met = (site.q, site.q, site.q)  # never touched
    if splits > 1:
        met = scratch(site.q.device, tiles.programs, site.group, site.shape["DV"])
    block_dv = site.shape["BLOCK_DV"]
    merged = min(triton_block(site.group), max(1, 2048 // block_dv))
    pdl, mixed = gpu.overlaps_launches(), len(site.q) != site.sequences
    decode_kernel[(rows * splits,)](
        *site.addresses, *form.tensors, *met, *site.strides, splits, tiles.least,
        *form.numbers, **site.shape, **form.flags,
        BLOCK_G=triton_block(site.group, 16), BLOCK_N=tiles.keys, SPLIT=splits > 1,
        MERGE_G=merged, MERGE_S=max(2, min(16, 4096 // (merged * block_dv))),
        MIXED=mixed, KNOWN=tiles.known, PDL=pdl,
        num_warps=tiles.warps, num_stages=tiles.stages, **overlap(pdl),
    )  # fmt: skip


def launch_prefill(site: _Site, form: Form, tiles: PrefillTiles) -> None:
    """More than one new token a sequence: a program for each block of them and each kv head."""
    from .paged_attention_kernel import prefill_kernel

    blocks = len(site.q) // (tiles.rows // site.group) + site.sequences
    pdl = gpu.overlaps_launches()
    prefill_kernel[(blocks * site.heads,)](
        *site.addresses, *form.tensors, *site.strides, site.sequences, blocks, len(site.q),
        *form.numbers, **site.shape, **form.flags, BLOCK_M=tiles.rows, BLOCK_N=tiles.keys,
        PDL=pdl, num_warps=tiles.warps, num_stages=tiles.stages, **overlap(pdl),
        **({"maxnreg": tiles.registers} if tiles.registers else {}),
    )  # fmt: skip


def overlap(pdl: bool) -> dict[str, bool]:
    """How a kernel is launched that waits for its predecessor itself."""
    return {"launch_pdl": True} if pdl else {}


def scratch(
    device: torch.device, programs: int, group: int, value_width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the ranges of a sequence meet: their sums, their scales, and how many have arrived.

    One for all launches of a site's shape: they follow each other, and each leaves only zeros
    arrived. 1 MB for four heads of 128 a group.
    """
    key = (device, programs, group, value_width)
    if key not in _SCRATCH:
        made = (
            torch.empty(programs * group * value_width, dtype=torch.float32, device=device),
            torch.empty(programs * group * 2, dtype=torch.float32, device=device),
            torch.zeros(programs, dtype=torch.int32, device=device),
        )
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # These zeros are made when the graph is replayed, and for no other graph.
            return made
        _SCRATCH[key] = made
    return _SCRATCH[key]


_SCRATCH: dict[
    tuple[torch.device, int, int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]
] = {}


def write_pages(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot: torch.Tensor,
) -> None:  # fmt: skip
    """Puts each new token's key and value at its slot.

    k [T, Hkv, D] and v [T, Hkv, Dv] with any strides but the last, which is 1; slot [T] int64.
    """
    from .write_pages_kernel import write_pages_kernel

    if k.stride(2) != 1 or v.stride(2) != 1:
        k, v = k.contiguous(), v.contiguous()
    tokens, heads, width = k.shape
    if not tokens:
        return
    block_d, block_dv = triton_block(width), triton_block(v.shape[2])
    # At most 4096 numbers a program: 32 registers a thread.
    block_h = min(triton_block(heads), max(1, 4096 // max(block_d, block_dv)))
    pdl = gpu.overlaps_launches()
    write_pages_kernel[(tokens * -(-heads // block_h),)](
        k, v, k_cache, v_cache, slot, *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3],
        *v_cache.stride()[:3], slot.stride(0), HKV=heads, D=width, DV=v.shape[2],
        PAGE=k_cache.shape[1], BLOCK_H=block_h, BLOCK_D=block_d, BLOCK_DV=block_dv, PDL=pdl,
        num_warps=4, **overlap(pdl),
    )  # fmt: skip


def applies(choice: Choice) -> bool:
    """Whether keys and values are written and attended to here, for ops with these arguments."""
    args = choice.args
    dtypes = {args[name].dtype for name in ("q", "k", "v", "k_cache", "v_cache")}
    group = args["q"].shape[1] // args["k"].shape[1]
    width = max(args["q"].shape[2], args["v"].shape[2])
    # A block of queries has all heads of a group, and shared memory holds 64 KiB of them; products
    # of float32 are three, and with as many of those a launch read where nothing lies.
    queries = triton_block(group) * triton_block(width) * args["q"].element_size()
    most = 1 << (15 if args["q"].dtype is torch.float32 else 16)
    return (
        gpu.runs_triton(choice.device)
        and len(dtypes) == 1
        and dtypes <= set(DTYPES)
        and all(args[name].dtype is dtype for name, dtype in METADATA.items())
        and width <= 256
        and group <= 128
        and queries <= most
        and args["k_cache"].stride()[-1] == args["v_cache"].stride()[-1] == 1
        and args["scale"] > 0
    )


@paged_attention.implement("triton", when=applies, priority=10, capturable=True)
def triton_paged(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cu_q: torch.Tensor,
    kv_len: torch.Tensor,
    block_table: torch.Tensor,
    slot: torch.Tensor,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `paged_attention`; see `attend_pages`."""
    from .triton_decode import decode_heads, holds

    if holds(q, k, len(kv_len)):
        form = Form.of(scale, window, chunk, softcap, sinks, alibi_slopes, q)
        return decode_heads(q, k, v, k_cache, v_cache, cu_q, kv_len, block_table, slot, form)
    write_pages(k, v, k_cache, v_cache, slot)
    return attend_pages(
        q, k_cache, v_cache, cu_q, kv_len, block_table, scale, window, chunk, softcap, sinks,
        alibi_slopes,
    )  # fmt: skip
