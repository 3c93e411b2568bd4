"""rotary_latent_attention: latents as a projection gives them, to the value of every head.

All of multi-head latent attention (DeepSeek-V2, 2024) between its projections, in the absorbed
form of `absorb_latent`. As one op, so that an implementation may choose what goes with what.
"""

from __future__ import annotations

from typing import Any

import torch

from ..linear.heads_linear import heads_linear
from ..norm.rms_norm import rms_norm
from ..op import register_op
from ..rope.rope import rope
from .cached_latent_attention import cached_latent_attention


@register_op(
    "rotary_latent_attention(Tensor q, Tensor q_rest, Tensor latent, Tensor rest, "
    "Tensor(a!) latent_cache, Tensor cu_q, Tensor kv_len, Tensor block_table, Tensor slot, "
    "Tensor key_weight, Tensor value_weight, float scale, int window=0, int chunk=0, "
    "float softcap=0.0, Tensor? sinks=None, Tensor? alibi_slopes=None, Tensor? cos=None, "
    "Tensor? sin=None, bool interleaved=False, Tensor? norm=None, float? eps=None, "
    "float norm_offset=0.0, bool cast_before_weight=True) -> Tensor"
)
def rotary_latent_attention(
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
    """q [T, H, K], q_rest [T, H, S], latent [T, 1, R], rest [T, 1, S] -> [T, H, N].

    `rms_norm` of latents if eps is given, with the weight norm [R] or without; `rope` of q_rest
    and rest if cos and sin [1, T, S] are, heads keeping their dtype; `heads_linear` of q and
    key_weight [H, R, K]; `cached_latent_attention` of both parts side by side, latent_cache
    [pages, page_size, 1, R + S]; `heads_linear` of that and value_weight [H, N, R].
    """
    if eps is not None:
        latent = rms_norm(latent, norm, eps, norm_offset, cast_before_weight)
    if cos is not None and sin is not None:
        turned = rope(q_rest[None], rest[None], cos, sin, interleaved, 2, True)
        q_rest, rest = (x[0] for x in turned)
    out = cached_latent_attention(
        torch.cat((heads_linear(q, key_weight), q_rest), -1), torch.cat((latent, rest), -1),
        latent_cache, cu_q, kv_len, block_table, slot, scale, latent.shape[2], window, chunk,
        softcap, sinks, alibi_slopes,
    )  # fmt: skip
    value: torch.Tensor = heads_linear(out, value_weight)
    return value


@rotary_latent_attention.fake
def _(
    q: torch.Tensor, q_rest: torch.Tensor, latent: torch.Tensor, rest: torch.Tensor,
    latent_cache: torch.Tensor, cu_q: torch.Tensor, kv_len: torch.Tensor,
    block_table: torch.Tensor, slot: torch.Tensor, key_weight: torch.Tensor,
    value_weight: torch.Tensor, *_: Any, **__: Any,
) -> torch.Tensor:  # fmt: skip
    return q.new_empty((q.shape[0], q.shape[1], value_weight.shape[1]))
