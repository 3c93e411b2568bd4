"""paged_attention: causal attention of a step's new tokens over pages of keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..cost import AttentionCost, Cost
from ..op import register_op


@register_op(
    "paged_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor cu_q, Tensor kv_len, Tensor block_table, Tensor slot, float scale, int window=0, "
    "int chunk=0, float softcap=0.0, Tensor? sinks=None, Tensor? alibi_slopes=None) -> Tensor",
    axes="t^ (h g) d^, t^ h d^, t^ h e^, p^ s^ h d^, p^ s^ h e^, b^, b^, b^ w^, t^, (h g), (h g) "
    "-> t^ (h g) e^",
)
def paged_attention(
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
    """Writes k and v at their slots, then attends over all tokens known of each sequence.

    q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv]; k_cache and v_cache [pages, page_size, Hkv, D or
    Dv]; cu_q [B + 1], kv_len [B], block_table [B, W] int32; slot [T] int64, the flat position
    page · page_size + offset of each new token. Returns [T, Hq, Dv]. The other arguments are
    those of `attention`. Pages wholly before a window may be any; they are never read.
    """
    write_pages(k, v, k_cache, v_cache, slot)
    page_size = k_cache.shape[1]
    out = q.new_zeros((q.shape[0], q.shape[1], v.shape[2]))
    bounds, lengths = cu_q.tolist(), kv_len.tolist()
    for index, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if end == start:
            continue
        length = lengths[index]
        first = first_visible(length - (end - start), window, chunk)
        page = first // page_size
        pages = block_table[index, page : -(-length // page_size)].long()
        seen = slice(first - page * page_size, length - page * page_size)
        out[start:end] = attend(
            q[start:end], k_cache[pages].flatten(0, 1)[seen], v_cache[pages].flatten(0, 1)[seen],
            scale, window, chunk, softcap, True, sinks, alibi_slopes, first,
        )  # fmt: skip
    return out


@paged_attention.fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))


def _cost(arguments: Mapping[str, Any]) -> Cost:
    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    per_key = AttentionCost(
        key_bytes=k.shape[1] * (k.shape[2] + v.shape[2]) * arguments["k_cache"].dtype.itemsize,
        pair_flops=2 * q.shape[1] * (k.shape[2] + v.shape[2]),
        window=arguments["window"],
        chunk=arguments["chunk"],
    )
    return Cost(attention=(per_key,))


paged_attention.cost = _cost


def write_pages(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot: torch.Tensor,
) -> None:  # fmt: skip
    """Puts each new token's key and value at its slot."""
    k_cache.view(-1, *k_cache.shape[2:])[slot] = k
    v_cache.view(-1, *v_cache.shape[2:])[slot] = v


def first_visible(query: int, window: int, chunk: int) -> int:
    """Lowest position that the query at position `query`, or any later one, may see."""
    if window:
        return max(0, query - window + 1)
    return query // chunk * chunk if chunk else 0


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
    causal: bool,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    first_key: int = 0,
) -> torch.Tensor:
    """One sequence: its last queries over its keys, in float32.

    q [Tq, Hq, D] are the last Tq positions of the keys k [Tk, Hkv, D], of which the first is at
    position `first_key`. Returns [Tq, Hq, Dv] in q's dtype.
    """
    groups = q.shape[1] // k.shape[1]
    keys = k.float().repeat_interleave(groups, dim=1)
    values = v.float().repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    key = first_key + torch.arange(k.shape[0], device=q.device)
    query = key[-1] + 1 - q.shape[0] + torch.arange(q.shape[0], device=q.device)
    distance = key[None, :] - query[:, None]
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.float()[:, None, None] * distance
    seen = distance <= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window:
        seen = seen & (distance > -window)
    if chunk:
        seen = seen & (key[None, :] // chunk == query[:, None] // chunk)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        sink = sinks.float()[:, None, None].expand(-1, q.shape[0], 1)
        weights = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
