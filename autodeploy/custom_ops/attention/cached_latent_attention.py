"""cached_latent_attention: `paged_attention` over one cache that holds keys and, in them, values.

Nothing of its own to compute: the values are a slice of the cache, which the paged kernels read
as they read any cache with strides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..cost import AttentionCost, Cost
from ..op import Choice, Implementation, register_op
from . import native_cpu as _native_cpu  # noqa: F401 - registers what is taken over below
from . import torch_cpu as _torch_cpu  # noqa: F401 - registers what is taken over below
from .paged_attention import paged_attention


@register_op(
    "cached_latent_attention(Tensor q, Tensor kv, Tensor(a!) latent_cache, Tensor cu_q, "
    "Tensor kv_len, Tensor block_table, Tensor slot, float scale, int value_width, int window=0, "
    "int chunk=0, float softcap=0.0, Tensor? sinks=None, Tensor? alibi_slopes=None) -> Tensor",
    axes="t^ (h g) d^, t^ h d^, p^ s^ h d^, b^, b^, b^ w^, t^, (h g), (h g) -> t^ (h g) e^",
)
def cached_latent_attention(
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
    """Writes kv at its slots, then attends over all tokens known of each sequence.

    q [T, Hq, D], kv [T, Hkv, D]; latent_cache [pages, page_size, Hkv, D], of which the first
    value_width columns are the values. Returns [T, Hq, value_width]. The other arguments are
    those of `paged_attention`.
    """
    out: torch.Tensor = paged_attention.reference(
        q, kv, kv[..., :value_width], latent_cache, latent_cache[..., :value_width], cu_q, kv_len,
        block_table, slot, scale, window, chunk, softcap, sinks, alibi_slopes,
    )  # fmt: skip
    return out


@cached_latent_attention.fake
def _(
    q: torch.Tensor, kv: torch.Tensor, latent_cache: torch.Tensor, cu_q: torch.Tensor,
    kv_len: torch.Tensor, block_table: torch.Tensor, slot: torch.Tensor, scale: float,
    value_width: int, *_: Any, **__: Any,
) -> torch.Tensor:  # fmt: skip
    return q.new_empty((q.shape[0], q.shape[1], value_width))


def _cost(arguments: Mapping[str, Any]) -> Cost:
    q, kv, cache = arguments["q"], arguments["kv"], arguments["latent_cache"]
    per_key = AttentionCost(
        key_bytes=kv.shape[1] * kv.shape[2] * cache.dtype.itemsize,
        pair_flops=2 * q.shape[1] * (kv.shape[2] + arguments["value_width"]),
        window=arguments["window"],
        chunk=arguments["chunk"],
    )
    return Cost(attention=(per_key,))


cached_latent_attention.cost = _cost


def _take_over(way: Implementation) -> None:
    """Makes a way to run `paged_attention`, one that reads slices of caches, a way to run this."""

    def applies(choice: Choice) -> bool:
        given = choice.args
        cache = given["latent_cache"]
        pair = {"k": given["kv"], "v": given["kv"], "k_cache": cache, "v_cache": cache}
        return way.when(Choice(choice.device, {**given, **pair}))

    @cached_latent_attention.implement(way.name, when=applies, priority=way.priority)
    def run(
        q: torch.Tensor, kv: torch.Tensor, latent_cache: torch.Tensor, cu_q: torch.Tensor,
        kv_len: torch.Tensor, block_table: torch.Tensor, slot: torch.Tensor, scale: float,
        value_width: int, *form: Any,
    ) -> torch.Tensor:  # fmt: skip
        out: torch.Tensor = way.function(
            q, kv, kv[..., :value_width], latent_cache, latent_cache[..., :value_width], cu_q,
            kv_len, block_table, slot, scale, *form,
        )  # fmt: skip
        return out


for _name in ("torch_cpu", "native_cpu"):
    _take_over(paged_attention.implementation(_name))
