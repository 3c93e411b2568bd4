"""rotary_paged_attention: heads as a projection gives them, normalised, rotated and attended to."""

from __future__ import annotations

from typing import Any

import torch

from ..norm.rms_norm import rms_norm
from ..op import register_op
from ..rope.rope import rope
from .paged_attention import paged_attention


@register_op(
    "rotary_paged_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor cu_q, Tensor kv_len, Tensor block_table, Tensor slot, float scale, int window=0, "
    "int chunk=0, float softcap=0.0, Tensor? sinks=None, Tensor? alibi_slopes=None, "
    "Tensor? cos=None, Tensor? sin=None, bool interleaved=False, Tensor? q_norm=None, "
    "Tensor? k_norm=None, float? q_eps=None, float? k_eps=None, float norm_offset=0.0, "
    "bool cast_before_weight=True) -> Tensor",
    axes="t^ (h g) d^, t^ h d^, t^ h e^, p^ s^ h d^, p^ s^ h e^, b^, b^, b^ w^, t^, (h g), (h g), "
    "o^ t^ r^, o^ t^ r^, d^, d^ -> t^ (h g) e^",
)
def rotary_paged_attention(
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
    """`rms_norm` of every head of q and k, `rope`, then `paged_attention`: [T, Hq, Dv].

    q [T, Hq, D], k [T, Hkv, D] and v [T, Hkv, Dv] may be views of one projection's rows. A norm
    is applied where its eps is given, with or without the weight q_norm or k_norm [D]; cos and
    sin [1, T, R] with R <= D, or neither; heads keep their dtype. Between its parts the result has
    the dtypes, and so the rounding, of the three ops one after the other.
    """
    if q_eps is not None:
        q = rms_norm(q, q_norm, q_eps, norm_offset, cast_before_weight)
    if k_eps is not None:
        k = rms_norm(k, k_norm, k_eps, norm_offset, cast_before_weight)
    if cos is not None and sin is not None:
        q, k = (x[0] for x in rope(q[None], k[None], cos, sin, interleaved, 2, True))
    return paged_attention(
        q, k, v, k_cache, v_cache, cu_q, kv_len, block_table, slot, scale, window, chunk, softcap,
        sinks, alibi_slopes,
    )  # fmt: skip


@rotary_paged_attention.fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
