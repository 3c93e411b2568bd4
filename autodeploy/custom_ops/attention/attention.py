"""attention: softmax(q kᵀ · scale + bias) v within each packed sequence.

What capture records for every attention layer, and the meaning of `paged_attention`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..contract import CacheSpec
from ..op import Cached, register_op
from .paged_attention import attend, paged_attention


@register_op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor cu_q, float scale, int window=0, int chunk=0, "
    "float softcap=0.0, bool causal=True, Tensor? sinks=None, Tensor? alibi_slopes=None) -> Tensor",
    axes="t^ (h g) d^, t^ h d^, t^ h e^, b^, (h g), (h g) -> t^ (h g) e^",
)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    causal: bool = True,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv], cu_q [B + 1] int32 -> [T, Hq, Dv].

    Hq is a multiple of Hkv. window w: only the last w keys, the query's own included; chunk c:
    only keys of the query's block of c positions; softcap s: scores become s·tanh(score / s);
    sinks [Hq]: one more logit in each softmax, with no value; alibi_slopes [Hq]: adds
    slope · (key position - query position).
    """
    out = q.new_zeros((q.shape[0], q.shape[1], v.shape[2]))
    bounds = cu_q.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        if end > start:
            rows = slice(start, end)
            out[rows] = attend(
                q[rows], k[rows], v[rows], scale, window, chunk, softcap, causal, sinks,
                alibi_slopes,
            )  # fmt: skip
    return out


@attention.fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))


def _caches(arguments: Mapping[str, Any]) -> tuple[CacheSpec, ...]:
    def spec(name: str, value: torch.Tensor) -> CacheSpec:
        return CacheSpec(
            name, tuple(int(n) for n in value.shape[1:]), value.dtype, "token", arguments["window"]
        )

    return spec("k_cache", arguments["k"]), spec("v_cache", arguments["v"])


attention.cached = Cached(paged_attention, _caches)
