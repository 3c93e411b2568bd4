"""paged_attention as plain torch operations, for machines that cannot compile the C kernel.

Pages are gathered into whole keys and values, then torch's own attention runs: once over all
sequences that bring one token, and once for each that brings more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..op import Choice
from .paged_attention import paged_attention, write_pages

# Numbers gathered at a time: what stays in the processor's cache, and in memory it already has.
# 32 sequences of 300 tokens, 12 heads of 64 in bfloat16: 25 ms all at once, 15 ms in parts.
_GATHERED = 1 << 20


@dataclass(frozen=True)
class _Form:
    scale: float
    window: int
    chunk: int
    softcap: float
    sinks: torch.Tensor | None
    alibi_slopes: torch.Tensor | None

    @property
    def plain(self) -> bool:
        """Nothing but causal."""
        return not (self.window or self.chunk or self.softcap) and (
            self.sinks is None and self.alibi_slopes is None
        )


def _applies(choice: Choice) -> bool:
    dtypes = {choice.args[name].dtype for name in ("q", "k", "v", "k_cache", "v_cache")}
    return choice.device.type == "cpu" and len(dtypes) == 1


@paged_attention.implement("torch_cpu", when=_applies, priority=1)
def torch_cpu(
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
    """As `paged_attention`; q, k, v and both caches of one dtype."""
    write_pages(k, v, k_cache, v_cache, slot)
    form = _Form(scale, window, chunk, softcap, sinks, alibi_slopes)
    out = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    starts, counts, length = cu_q[:-1].long(), cu_q.diff(), kv_len.long()
    single = (counts == 1).nonzero().flatten()
    fitting = _GATHERED // (int(length.max()) * v[0].numel()) if len(length) else 0
    groups = [(part, 1) for part in single.split(max(1, fitting)) if len(part)]
    groups += [(index[None], int(counts[index])) for index in (counts > 1).nonzero().flatten()]
    for members, count in groups:
        query = length[members][:, None] + torch.arange(-count, 0)
        first = _first_visible(query[:, :1], window, chunk)
        key = torch.arange(int(first.min()), int(query.max()) + 1)[None]
        # Where a sequence may not look, it reads a key of its own: any page may be there.
        at = _slots(block_table[members], key.clamp(first, query[:, -1:]), k_cache.shape[1])
        rows = starts[members][:, None] + torch.arange(count)
        found = _attend(q[rows], _gather(k_cache, at), _gather(v_cache, at), key, query, form)
        out[rows.flatten()] = found.flatten(0, 1)
    return out


def _first_visible(query: torch.Tensor, window: int, chunk: int) -> torch.Tensor:
    """Lowest position that queries at `query` or later may see; elementwise."""
    first = torch.zeros_like(query)
    if window:
        first = (query - window + 1).clamp(min=0)
    return first.maximum(query // chunk * chunk) if chunk else first


def _slots(tables: torch.Tensor, positions: torch.Tensor, page_size: int) -> torch.Tensor:
    """[n, W] page ids and [n, L] positions -> [n, L] flat positions in the cache."""
    pages = tables.long().gather(1, positions // page_size)
    return pages * page_size + positions % page_size


def _gather(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """[pages, page_size, ...] and [n, L] -> [n, L, ...]; three times as fast as indexing."""
    return cache.flatten(0, 1).index_select(0, slots.flatten()).unflatten(0, slots.shape)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key: torch.Tensor, query: torch.Tensor,
    form: _Form,
) -> torch.Tensor:  # fmt: skip
    """q [n, Tq, Hq, D] at positions query [n, Tq], k and v [n, Tk, Hkv, ..] at key [1, Tk]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if form.plain and key.shape[1] == q.shape[2]:
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=form.scale, enable_gqa=gqa
        )
        return out.transpose(1, 2)
    distance = key[:, None, :] - query[:, :, None]
    seen = distance <= 0
    if form.window:
        seen &= distance > -form.window
    if form.chunk:
        seen &= key[:, None, :] // form.chunk == query[:, :, None] // form.chunk
    bias = torch.zeros(distance.shape, dtype=torch.float32).masked_fill_(~seen, float("-inf"))
    bias = bias[:, None]
    if form.alibi_slopes is not None:
        bias = bias + form.alibi_slopes.float()[:, None, None] * distance[:, None]
    if form.softcap:
        return _attend_capped(q, k, v, bias, form).transpose(1, 2)
    if form.sinks is not None:
        # A sink is one more key of zeros, whose bias is the logit, with a value of zeros.
        sink = form.sinks.float()[:, None, None].expand(len(q), -1, q.shape[2], 1)
        bias = torch.cat((bias.expand(-1, q.shape[1], -1, -1), sink), -1)
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    if q.shape[2] == 1:
        return _attend_single(q, k, v, bias, form.scale)
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=form.scale, enable_gqa=gqa)
    return out.transpose(1, 2)


def _attend_single(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float
) -> torch.Tensor:
    """One query a head, [n, heads, 1, width]: the heads of a group are given as its queries.

    32 sequences of 300 tokens, 12 heads on 4 of 64 in bfloat16: 17 ms as single queries, 2 ms so.
    """
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    if bias.shape[1] != 1:
        bias = bias.squeeze(2).unflatten(1, groups)
    out = F.scaled_dot_product_attention(
        q.squeeze(2).unflatten(1, groups), k, v, attn_mask=bias, scale=scale
    )
    return out.flatten(1, 2)[:, None]


def _attend_capped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, form: _Form
) -> torch.Tensor:
    """All [n, heads, tokens, width]; scores capped before the bias, which torch's cannot."""
    groups = q.shape[1] // k.shape[1]
    keys, values = (t.float().repeat_interleave(groups, 1) for t in (k, v))
    scores = form.softcap * torch.tanh(q.float() @ keys.mT * (form.scale / form.softcap))
    scores = scores + bias
    if form.sinks is not None:
        sink = form.sinks.float()[:, None, None].expand(len(q), -1, q.shape[2], 1)
        scores = torch.cat((scores, sink), -1)
    weights = scores.softmax(-1)[..., : keys.shape[2]]
    return (weights @ values).to(q.dtype)
