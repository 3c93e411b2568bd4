"""relay_tokens: what a step sampled, kept for the next one."""

from __future__ import annotations

import torch

from ..op import register_op


@register_op("relay_tokens(Tensor tokens, Tensor slots, Tensor(a!) newest) -> ()", capturable=True)
def relay_tokens(tokens: torch.Tensor, slots: torch.Tensor, newest: torch.Tensor) -> None:
    """newest [slots] int64 gets tokens [S] int64 at slots [S] int64, and 0 for a token -1."""
    newest.index_copy_(0, slots, tokens.clamp(min=0))


@relay_tokens.fake
def _(tokens: torch.Tensor, slots: torch.Tensor, newest: torch.Tensor) -> None:
    return None
