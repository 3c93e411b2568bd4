"""packed_mask: the mask of packed sequences as a tensor, for attention code that adds it itself.

A program that is served never runs it: capture writes it where a model uses its mask as a
tensor, and recognises the attention around it as one `attention` node, which needs no mask.
"""

from __future__ import annotations

import torch

from ..op import register_op


@register_op(
    "packed_mask(Tensor cu_q, SymInt tokens, ScalarType dtype, int window=0, int chunk=0, "
    "bool causal=True) -> Tensor",
)
def packed_mask(
    cu_q: torch.Tensor,
    tokens: int,
    dtype: torch.dtype,
    window: int = 0,
    chunk: int = 0,
    causal: bool = True,
) -> torch.Tensor:
    """cu_q [B + 1] int32, cu_q[-1] = tokens = T -> [1, 1, T, T], query by key.

    dtype bool: True where a query sees a key; a floating dtype: 0 there and the dtype's lowest
    number elsewhere. A key of another sequence is never seen; window and chunk as in `attention`.
    """
    row = torch.arange(tokens, device=cu_q.device)
    sequence = torch.searchsorted(cu_q.long()[1:], row, right=True)
    position = row - cu_q.long()[sequence]
    query, key = position[:, None], position[None, :]
    seen = sequence[:, None] == sequence[None, :]
    if causal:
        seen = seen & (key <= query)
    if window:
        seen = seen & (key > query - window)
    if chunk:
        seen = seen & (key // chunk == query // chunk)
    if dtype is torch.bool:
        return seen[None, None]
    hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=cu_q.device)
    return torch.where(seen, torch.zeros_like(hidden), hidden)[None, None]


@packed_mask.fake
def _(
    cu_q: torch.Tensor,
    tokens: int,
    dtype: torch.dtype,
    window: int = 0,
    chunk: int = 0,
    causal: bool = True,
) -> torch.Tensor:
    return cu_q.new_empty((1, 1, tokens, tokens), dtype=dtype)
