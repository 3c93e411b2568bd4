"""route: the experts of each token, the most probable first, and their weights."""

from __future__ import annotations

import torch

from ..op import register_op


@register_op(
    "route(Tensor logits, int k, bool normalize, ScalarType dtype) -> (Tensor, Tensor)",
    axes="... e^ -> ... k^, ... k^",
    capturable=True,
)
def route(
    logits: torch.Tensor, k: int, normalize: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [..., E] -> index int64 and weights [..., k]: the largest of a softmax in float32.

    normalize: the k weights are divided by their sum. They are then rounded to `dtype`. Of equal
    probabilities any may be chosen: as `torch.topk` does here, the lower index first in Triton.
    """
    weights, index = logits.float().softmax(-1).topk(k)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return index, weights.to(dtype)


@route.fake
def _(
    logits: torch.Tensor, k: int, normalize: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*logits.shape[:-1], k)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=dtype)
