"""cache_mark: an identity that shows, in the graph, what a model itself would keep per token."""

from __future__ import annotations

import torch

from ..op import register_op


@register_op(
    "cache_mark(Tensor key, Tensor value, int layer) -> (Tensor, Tensor)",
    axes="b h t d, b g t e -> b h t d, b g t e",
)
def cache_mark(
    key: torch.Tensor, value: torch.Tensor, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """key [1, H, T, D] and value [1, G, T, E] as layer `layer` gives them to its cache."""
    return key.clone(), value.clone()


@cache_mark.fake
def _(key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(key), torch.empty_like(value)
