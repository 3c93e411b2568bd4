"""rotary_paged_attention in Triton: one launch for a decoding step, else two or three.

The first of several turns heads and writes keys and values to their pages; `attend_pages` follows.
"""

from __future__ import annotations

import torch

from ..op import Choice
from ..rope.triton_rope import HeadNorm, Pages, applies, turn_heads
from . import triton_paged
from .rotary_paged_attention import rotary_paged_attention
from .triton_decode import Turn, decode_heads, holds


def _applies(choice: Choice) -> bool:
    args = choice.args
    q, k, cos, sin = (args[name] for name in ("q", "k", "cos", "sin"))
    weights = [w for w in (args["q_norm"], args["k_norm"]) if w is not None]
    return (
        triton_paged.applies(choice)
        and (cos is None) == (sin is None)
        and (cos is None or applies(q, k, cos, sin))
        and all(w.dtype is q.dtype and w.stride() == (1,) for w in weights)
    )


@rotary_paged_attention.implement("triton", when=_applies, priority=10, capturable=True)
def triton_rotary(
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
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    interleaved: bool = False,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    q_eps: float | None = None,
    k_eps: float | None = None,
    norm_offset: float = 0.0,
    cast_before_weight: bool = True,
) -> torch.Tensor:
    """As `rotary_paged_attention`; one dtype, but cos and sin may be float32."""
    norm = HeadNorm(q_norm, k_norm, q_eps, k_eps, norm_offset, cast_before_weight)
    if holds(q, k, len(kv_len)):
        form = triton_paged.Form.of(scale, window, chunk, softcap, sinks, alibi_slopes, q)
        turn = Turn(norm, cos, sin, interleaved)
        return decode_heads(q, k, v, k_cache, v_cache, cu_q, kv_len, block_table, slot, form, turn)
    q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k, v))
    turned = q.new_empty(q.shape)
    pages = Pages(v, k_cache, v_cache, slot)
    turn_heads(q, k, cos, sin, interleaved, turned, norm=norm, pages=pages)
    return triton_paged.attend_pages(
        turned, k_cache, v_cache, cu_q, kv_len, block_table, scale, window, chunk, softcap, sinks,
        alibi_slopes,
    )  # fmt: skip
