"""cached_latent_attention in Triton: `triton_paged`'s two kernels, for rows read only once.

The wide rows leave room for few heads a program, and what the ranges of a cut sequence leave is as
large as the rows themselves; a launch of its own adds them up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import gpu
from ..op import Choice
from .cached_latent_attention import cached_latent_attention
from .triton_paged import DTYPES, METADATA, Form, overlap, triton_block, write_pages


@dataclass(frozen=True)
class LatentTiles:
    """How launches are cut up: for one token a sequence, and for any number of them."""

    rows: int
    """Heads of a program; in prefill tokens times heads."""
    keys: int
    """Of one block."""
    warps: int
    stages: int
    least: int = 1
    """Blocks a range has at least, before a sequence is cut into ranges at all."""
    programs: int = 0
    """A sequence is cut as long as the launch stays within this number of programs."""


def decode_tiles(width: int, itemsize: int, group: int, device: torch.device) -> LatentTiles:
    """Tiles for single tokens of `group` heads a latent, rows of `width` numbers (a power of 2)."""
    rows = min(64, triton_block(group, 16)) if itemsize == 2 else 16
    keys = 32 if itemsize == 2 else 16
    processors = gpu.multiprocessors(device.index or 0)
    wide = rows * width > 16 * 512
    # A range leaves rows * width float32: it reads at least four times as many bytes.
    least = max(1, 8 * rows // (keys * itemsize))
    return LatentTiles(rows, keys, 8 if wide else 4, 3, least, processors * (1 if wide else 2))


def prefill_tiles(width: int, itemsize: int, group: int) -> LatentTiles:
    """Tiles for any number of tokens a sequence, as in `decode_tiles`."""
    if itemsize == 4:
        return LatentTiles(16, 16, 4, 2)
    return LatentTiles(64, 32, 8 if width > 256 else 4, 3)


def attend_latents(
    q: torch.Tensor,
    latent_cache: torch.Tensor,
    cu_q: torch.Tensor,
    kv_len: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    value_width: int,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """`cached_latent_attention` once the rows are written: [T, Hq, value_width].

    Takes what `attend_pages` takes, and treats rows that no sequence owns alike.
    """
    if q.stride(2) != 1:
        q = q.contiguous()
    out = q.new_empty((q.shape[0], q.shape[1], value_width))
    if not out.numel() or not len(kv_len):
        return out
    site = _Site(q, latent_cache, out, cu_q, kv_len, block_table)
    form = Form.of(scale, window, chunk, softcap, sinks, alibi_slopes, q)
    group, size = q.shape[1] // latent_cache.shape[2], q.element_size()
    width = split_row(q.shape[2], value_width)["BLOCK_MAIN"]
    launch_decode(site, form, decode_tiles(width, size, group, q.device))
    if len(q) != len(kv_len):
        launch_prefill(site, form, prefill_tiles(width, size, group))
    return out


def split_row(width: int, value_width: int) -> dict[str, int]:
    """A row's two parts and their blocks; the values lie in the first."""
    main = 1 << (width.bit_length() - 1)
    if main < value_width or width < 16:
        main = width
    rest = width - main
    return {
        "MAIN": main, "REST": rest, "BLOCK_MAIN": triton_block(main, 16),
        "BLOCK_REST": triton_block(rest, 16) if rest else 16,
    }  # fmt: skip


def split_heads(group: int, rows: int) -> int:
    """Parts of equal size, of at most `rows` heads each, that `group` heads are dealt out to."""
    return next(parts for parts in range(-(-group // rows), group + 1) if group % parts == 0)


@dataclass(frozen=True)
class _Site:
    """What is attended to by what, and where."""

    q: torch.Tensor
    latent_cache: torch.Tensor
    out: torch.Tensor
    cu_q: torch.Tensor
    kv_len: torch.Tensor
    block_table: torch.Tensor

    @property
    def addresses(self) -> tuple[torch.Tensor, ...]:
        return (self.q, self.latent_cache, self.out, self.cu_q, self.kv_len, self.block_table)

    @property
    def strides(self) -> tuple[int, ...]:
        rows = (*self.q.stride()[:2], *self.latent_cache.stride()[:3])
        return (*rows, self.block_table.stride(0))

    def shape(self, tiles: LatentTiles) -> dict[str, Any]:
        """Constants of the kernels."""
        page_size, latents = self.latent_cache.shape[1:3]
        parts = split_heads(self.q.shape[1] // latents, tiles.rows)
        return {
            "HKV": latents * parts, "PARTS": parts, "GROUP": self.q.shape[1] // (latents * parts),
            "DV": self.out.shape[2], "PAGE": page_size, "BLOCK_M": tiles.rows,
            "BLOCK_N": tiles.keys, **split_row(self.q.shape[2], self.out.shape[2]),
            "PRECISION": "tf32x3" if self.q.dtype is torch.float32 else "tf32",
        }  # fmt: skip


def launch_decode(site: _Site, form: Form, tiles: LatentTiles) -> None:
    """Single tokens: a program for each range of keys of each sequence and part of its heads.

    All tokens if there are as many as sequences, else those that are their sequence's only one.
    """
    from .latent_attention_kernel import latent_decode_kernel, latent_merge_kernel

    shape = site.shape(tiles)
    places, group, value_width = len(site.kv_len) * shape["HKV"], shape["GROUP"], shape["DV"]
    longest = site.block_table.shape[1] * shape["PAGE"]
    ranges = -(-form.visible(longest) // (tiles.keys * tiles.least))
    splits = max(1, min(ranges, tiles.programs // places))
    scratch = (site.q, site.q, site.q)  # never touched
    if splits > 1:
        left = places * splits * group
        scratch = (
            site.q.new_empty(left * value_width, dtype=torch.float32),
            site.q.new_empty(left * 2, dtype=torch.float32),
            site.kv_len.new_empty(places),
        )
    mixed = len(site.q) != len(site.kv_len)
    pdl = gpu.overlaps_launches()
    latent_decode_kernel[(places * splits,)](
        *site.addresses, *form.tensors, *scratch, *site.strides, len(site.kv_len), splits,
        tiles.least, *form.numbers, **shape, **form.flags, SPLIT=splits > 1, MIXED=mixed, PDL=pdl,
        num_warps=tiles.warps, num_stages=tiles.stages, **overlap(pdl),
    )  # fmt: skip
    if splits > 1:
        columns = min(128, triton_block(value_width))
        latent_merge_kernel[(places * group, -(-value_width // columns))](
            site.out, site.cu_q, form.tensors[0], *scratch, len(site.kv_len), splits,
            HKV=shape["HKV"], GROUP=group, DV=value_width, BLOCK_C=columns, BLOCK_S=32,
            SINKS=form.flags["SINKS"], MIXED=mixed, PDL=pdl, num_warps=4, **overlap(pdl),
        )  # fmt: skip


def launch_prefill(site: _Site, form: Form, tiles: LatentTiles) -> None:
    """Many tokens a sequence: a program for each block of them and part of the heads."""
    from .latent_attention_kernel import latent_prefill_kernel

    shape = site.shape(tiles)
    blocks = len(site.q) // (tiles.rows // shape["GROUP"]) + len(site.kv_len)
    pdl = gpu.overlaps_launches()
    latent_prefill_kernel[(blocks * shape["HKV"],)](
        *site.addresses, *form.tensors, *site.strides, len(site.kv_len), blocks, len(site.q),
        *form.numbers, **shape, **form.flags, PDL=pdl, num_warps=tiles.warps,
        num_stages=tiles.stages, **overlap(pdl),
    )  # fmt: skip


def applies(choice: Choice) -> bool:
    """Whether rows are written and attended to here, for ops with these arguments."""
    args = choice.args
    q, cache = args["q"], args["latent_cache"]
    dtypes = {args[name].dtype for name in ("q", "kv", "latent_cache")}
    blocks = split_row(q.shape[2], args["value_width"])
    return (
        gpu.runs_triton(choice.device)
        and len(dtypes) == 1
        and dtypes <= set(DTYPES)
        and all(args[name].dtype is dtype for name, dtype in METADATA.items())
        and q.shape[2] > 1
        and blocks["BLOCK_MAIN"] <= 512
        and blocks["BLOCK_REST"] <= 128
        and cache.stride()[-1] == 1
        and args["scale"] > 0
    )


@cached_latent_attention.implement("triton", when=applies, priority=10, capturable=True)
def triton_latent(
    q: torch.Tensor,
    kv: torch.Tensor,
    latent_cache: torch.Tensor,
    cu_q: torch.Tensor,
    kv_len: torch.Tensor,
    block_table: torch.Tensor,
    slot: torch.Tensor,
    scale: float,
    value_width: int,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `cached_latent_attention`; see `attend_latents`."""
    # A row is written as a key and a value side by side: one launch.
    first = split_row(kv.shape[2], value_width)
    cut = first["MAIN"] if first["REST"] else kv.shape[2] // 2
    parts = (kv[..., :cut], kv[..., cut:])
    write_pages(*parts, latent_cache[..., :cut], latent_cache[..., cut:], slot)
    return attend_latents(
        q, latent_cache, cu_q, kv_len, block_table, scale, value_width, window, chunk, softcap,
        sinks, alibi_slopes,
    )  # fmt: skip
