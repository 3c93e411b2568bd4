"""rotary_latent_attention in Triton: three launches for a decoding step of few tokens.

Queries are brought to the latent, attended with, and brought to values; the last also adds up the
ranges that a few sequences are cut into. With more tokens that is a launch of its own. Steps that
bring more than a token a sequence norm, turn and write first, then do as `triton_latent`.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import gpu
from ..linear.triton_heads import applies as multiplies
from ..linear.triton_heads import multiply_heads
from ..norm.triton_norm import rms_norm_rows
from ..op import Choice
from ..rope.triton_rope import HeadNorm, Pages, turn_heads
from ..rope.triton_rope import applies as turns
from . import triton_latent
from .rotary_latent_attention import rotary_latent_attention
from .triton_decode import Turn
from .triton_latent import LatentTiles, attend_latents, decode_tiles, split_heads
from .triton_paged import Form, overlap, triton_block

FEW = 8
"""Tokens up to which ranges are added up by every program that reads their sum: 18 KB for each
sequence of 576 rows, beside 16 KB of the weight."""


def _applies(choice: Choice) -> bool:
    args = choice.args
    names = ("q", "q_rest", "latent", "rest", "key_weight", "value_weight")
    q, q_rest, latent, rest, key_weight, value_weight = (args[name] for name in names)
    rank, width = latent.shape[2], latent.shape[2] + rest.shape[2]
    cos, sin, norm = args["cos"], args["sin"], args["norm"]
    wide = {
        "q": q.new_empty((q.shape[0], q.shape[1], width)),
        "kv": latent.new_empty((latent.shape[0], 1, width)), "value_width": rank,
    }  # fmt: skip
    return (
        triton_latent.applies(Choice(choice.device, {**args, **wide}))
        and len({args[name].dtype for name in names}) == 1
        and latent.shape[1] == rest.shape[1] == 1
        and triton_block(rank, 16) <= 512
        and triton_block(rest.shape[2], 16) <= 128
        and multiplies(q, key_weight)
        and value_weight.shape[2] == rank
        and (norm is None or (norm.dtype is q.dtype and norm.stride() == (1,)))
        and (cos is None) == (sin is None)
        and (cos is None or (turns(q_rest, rest, cos, sin) and cos.shape[2] == rest.shape[2]))
    )


@rotary_latent_attention.implement("triton", when=_applies, priority=10, capturable=True)
def triton_rotary_latent(
    q: torch.Tensor,
    q_rest: torch.Tensor,
    latent: torch.Tensor,
    rest: torch.Tensor,
    latent_cache: torch.Tensor,
    cu_q: torch.Tensor,
    kv_len: torch.Tensor,
    block_table: torch.Tensor,
    slot: torch.Tensor,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    interleaved: bool = False,
    norm: torch.Tensor | None = None,
    eps: float | None = None,
    norm_offset: float = 0.0,
    cast_before_weight: bool = True,
) -> torch.Tensor:
    """As `rotary_latent_attention`; one dtype, but cos and sin may be float32."""
    q_rest, latent, rest = (
        t if t.stride(2) == 1 else t.contiguous() for t in (q_rest, latent, rest)
    )
    tokens, heads, rank = len(q), q.shape[1], latent.shape[2]
    if tokens and tokens == len(kv_len):
        asked = q.new_empty((tokens, heads, rank))
        multiply_heads(q, key_weight, asked)
        turn = Turn(HeadNorm(None, norm, None, eps, norm_offset, cast_before_weight), cos, sin,
                    interleaved)  # fmt: skip
        form = Form.of(scale, window, chunk, softcap, sinks, alibi_slopes, q)
        return decode_latents(
            asked, q_rest, latent, rest, latent_cache, cu_q, kv_len, block_table, slot,
            value_weight, form, turn,
        )  # fmt: skip
    wide = q.new_empty((tokens, heads, rank + rest.shape[2]))
    multiply_heads(q, key_weight, wide[..., :rank])
    if eps is not None:
        latent = rms_norm_rows(latent, norm, eps, norm_offset, cast_before_weight)
    # A latent is written as the value beside a key.
    pages = Pages(latent, latent_cache[..., rank:], latent_cache[..., :rank], slot)
    turn_heads(q_rest, rest, cos, sin, interleaved, wide[..., rank:], pages=pages)
    out = attend_latents(
        wide, latent_cache, cu_q, kv_len, block_table, scale, rank, window, chunk, softcap, sinks,
        alibi_slopes,
    )  # fmt: skip
    return _values(out, value_weight)


def decode_latents(
    q: torch.Tensor,
    q_rest: torch.Tensor,
    latent: torch.Tensor,
    rest: torch.Tensor,
    latent_cache: torch.Tensor,
    cu_q: torch.Tensor,
    kv_len: torch.Tensor,
    block_table: torch.Tensor,
    slot: torch.Tensor,
    value_weight: torch.Tensor,
    form: Form,
    turn: Turn,
    tiles: LatentTiles | None = None,
) -> torch.Tensor:
    """Norms and turns a step's rows, writes them to their slots and attends: [T, H, N].

    q [T, H, R] in the latent already. As many tokens as sequences, mostly one each; the norm is
    that of keys. Rows of tokens that no sequence owns may be anything.
    """
    from .rotary_latent_kernel import rotary_latent_kernel

    tokens, heads, rank = q.shape
    width, page_size, norm = rest.shape[2], latent_cache.shape[1], turn.norm
    tiles = tiles or decode_tiles(triton_block(rank, 16), q.element_size(), heads, q.device)
    parts = split_heads(heads, tiles.rows)
    ranges = -(-form.visible(block_table.shape[1] * page_size) // (tiles.keys * tiles.least))
    splits = max(1, min(ranges, tiles.programs // (tokens * parts)))
    out, left = q, (q, q, q)  # never touched
    if splits > 1:
        left = (
            q.new_empty(tokens * splits * heads * rank, dtype=torch.float32),
            q.new_empty(tokens * splits * heads * 2, dtype=torch.float32),
            kv_len.new_empty(tokens * parts),
        )
    else:
        out = torch.empty_like(q)
    cos, sin = (
        q if t is None else t if t.stride(2) == 1 else t.contiguous() for t in (turn.cos, turn.sin)
    )
    pdl = gpu.overlaps_launches()
    rotary_latent_kernel[(tokens * parts * splits,)](
        q, q_rest, latent, rest, latent_cache, out, cu_q, kv_len, block_table, slot, cos, sin,
        q if norm.k_weight is None else norm.k_weight, *form.tensors, *left, *q.stride()[:2],
        *q_rest.stride()[:2], latent.stride(0), rest.stride(0), *latent_cache.stride()[:2],
        block_table.stride(0), slot.stride(0), cos.stride(1), sin.stride(1), tokens, splits,
        tiles.least, *form.numbers, norm.k_eps or 0.0, norm.offset, PARTS=parts,
        GROUP=heads // parts, MAIN=rank, REST=width, PAGE=page_size, BLOCK_M=tiles.rows,
        BLOCK_N=tiles.keys, BLOCK_MAIN=triton_block(rank, 16), BLOCK_REST=triton_block(width, 16),
        HALF=0 if turn.cos is None else width // 2, INTERLEAVED=turn.interleaved,
        NORM=norm.k_eps is not None, WEIGHT=norm.k_weight is not None,
        FIRST=norm.cast_before_weight, **form.flags, SPLIT=splits > 1,
        PRECISION=_precision(q), PDL=pdl, num_warps=tiles.warps, num_stages=tiles.stages,
        **overlap(pdl),
    )  # fmt: skip
    if splits == 1:
        return _values(out, value_weight)
    if tokens <= FEW:
        return _add_up(q, value_weight, form, left, splits, parts)
    return _values(_merged(q, cu_q, form, left, splits, parts), value_weight)


def _precision(q: torch.Tensor) -> str:
    return "tf32x3" if q.dtype is torch.float32 else "tf32"


def _values(out: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[T, H, N] of what was seen of latents [T, H, R]."""
    value = out.new_empty((out.shape[0], out.shape[1], weight.shape[1]))
    multiply_heads(out, weight, value)
    return value


def _add_up(
    q: torch.Tensor, weight: torch.Tensor, form: Form, left: tuple[torch.Tensor, ...], splits: int,
    parts: int, rows: int = 0,
) -> torch.Tensor:  # fmt: skip
    """The values [T, H, N] of ranges, of which there are at most `splits` a token and part."""
    from .rotary_latent_kernel import latent_values_kernel

    tokens, heads, rank = q.shape
    value = q.new_empty((tokens, heads, weight.shape[1]))
    rows = rows or min(16, triton_block(weight.shape[1]))
    pdl = gpu.overlaps_launches()
    latent_values_kernel[(-(-weight.shape[1] // rows), heads, tokens)](
        value, weight, form.tensors[0], *left, splits, *weight.stride(), *value.stride()[:2],
        PARTS=parts, GROUP=heads // parts, N=weight.shape[1], MAIN=rank, BLOCK_N=rows,
        BLOCK_MAIN=triton_block(rank, 16), BLOCK_S=8, SINKS=form.flags["SINKS"], PDL=pdl,
        num_warps=4, **overlap(pdl),
    )  # fmt: skip
    return value


def _merged(
    q: torch.Tensor, cu_q: torch.Tensor, form: Form, left: tuple[torch.Tensor, ...], splits: int,
    parts: int,
) -> torch.Tensor:  # fmt: skip
    """What heads saw, [T, H, R], of all their ranges."""
    from .latent_attention_kernel import latent_merge_kernel

    tokens, heads, rank = q.shape
    out = torch.empty_like(q)
    columns = min(128, triton_block(rank))
    pdl = gpu.overlaps_launches()
    options: dict[str, Any] = overlap(pdl)
    latent_merge_kernel[(tokens * heads, -(-rank // columns))](
        out, cu_q, form.tensors[0], *left, tokens, splits, HKV=parts, GROUP=heads // parts, DV=rank,
        BLOCK_C=columns, BLOCK_S=32, SINKS=form.flags["SINKS"], MIXED=False, PDL=pdl, num_warps=4,
        **options,
    )  # fmt: skip
    return out
