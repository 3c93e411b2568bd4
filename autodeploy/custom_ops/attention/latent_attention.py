"""latent_attention: attention whose values are the first columns of its keys.

What multi-head latent attention (DeepSeek-V2, 2024) becomes once the expansion of its latent has
moved to the query and the output: every head reads the same few numbers a token, as key and, in
part, as value. They are kept once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..contract import CacheSpec
from ..op import Cached, register_op
from .attention import attention
from .cached_latent_attention import cached_latent_attention


@register_op(
    "latent_attention(Tensor q, Tensor kv, Tensor cu_q, float scale, int value_width, "
    "int window=0, int chunk=0, float softcap=0.0, Tensor? sinks=None, "
    "Tensor? alibi_slopes=None) -> Tensor",
    axes="t^ (h g) d^, t^ h d^, b^, (h g), (h g) -> t^ (h g) e^",
)
def latent_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_q: torch.Tensor,
    scale: float,
    value_width: int,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [T, Hq, D], kv [T, Hkv, D], cu_q [B + 1] int32 -> [T, Hq, value_width].

    Causal attention with kv as keys and kv[..., :value_width] as values; Hq is a multiple of Hkv.
    The other arguments are those of `attention`.
    """
    out: torch.Tensor = attention.reference(
        q, kv, kv[..., :value_width], cu_q, scale, window, chunk, softcap, True, sinks,
        alibi_slopes,
    )  # fmt: skip
    return out


@latent_attention.fake
def _(
    q: torch.Tensor, kv: torch.Tensor, cu_q: torch.Tensor, scale: float, value_width: int,
    *_: Any, **__: Any,
) -> torch.Tensor:  # fmt: skip
    return q.new_empty((q.shape[0], q.shape[1], value_width))


def _caches(arguments: Mapping[str, Any]) -> tuple[CacheSpec, ...]:
    kv = arguments["kv"]
    shape = tuple(int(n) for n in kv.shape[1:])
    return (CacheSpec("latent_cache", shape, kv.dtype, "token", arguments["window"]),)


latent_attention.cached = Cached(cached_latent_attention, _caches)
