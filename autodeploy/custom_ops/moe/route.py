"""route: the experts of each token, the most probable first, and their weights.

Shared experts, which every token visits, come first: the blocks of their many rows are then the
first that a kernel over all experts takes up, and weights of others are read beside them.
"""

from __future__ import annotations

import torch

from ..op import register_op


@register_op(
    "route(Tensor logits, int k, bool normalize, ScalarType dtype, int shared=0, int gate=0) "
    "-> (Tensor, Tensor)",
    axes="... e^ -> ... k^, ... k^",
    capturable=True,
)
def route(
    logits: torch.Tensor,
    k: int,
    normalize: bool,
    dtype: torch.dtype,
    shared: int = 0,
    gate: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [..., E] -> index int64 and weights [..., shared + k].

    Experts 0 to shared - 1, then the k largest of a softmax in float32, where column 0 of the
    logits belongs to expert `shared`. normalize: the k weights are divided by their sum. Shared
    experts weigh 1 each or, if `gate` is not 0, the sigmoid of the logit in column `gate`; E is
    then `gate`, and columns after it are nothing's. All weights are rounded to `dtype`. Of equal
    probabilities any may be chosen: as `torch.topk` does here, the lower index first in Triton.
    """
    total = gate or logits.shape[-1]
    weights, index = logits[..., :total].float().softmax(-1).topk(k)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    if shared:
        always = torch.arange(shared, device=index.device)
        each = logits[..., gate : gate + 1].float().sigmoid() if gate else weights.new_ones(())
        rows = (*index.shape[:-1], shared)
        index = torch.cat([always.expand(rows), index + shared], -1)
        weights = torch.cat([each.expand(rows), weights], -1)
    return index, weights.to(dtype)


@route.fake
def _(
    logits: torch.Tensor,
    k: int,
    normalize: bool,
    dtype: torch.dtype,
    shared: int = 0,
    gate: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*logits.shape[:-1], shared + k)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=dtype)
