"""resolve_tokens: puts tokens that only the device knows into a step's input_ids."""

from __future__ import annotations

import torch

from ..op import register_op


@register_op("resolve_tokens(Tensor input_ids, Tensor tokens) -> Tensor", capturable=True)
def resolve_tokens(input_ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """input_ids [1, T] int64, where -1 - s stands for tokens[s]; tokens [S] int64 -> [1, T]."""
    known = tokens[(-1 - input_ids).clamp(min=0)]
    return torch.where(input_ids < 0, known, input_ids)


@resolve_tokens.fake
def _(input_ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(input_ids)
