"""argmax_rows: the most likely token of each row, and which rows have none."""

from __future__ import annotations

import torch

from ..op import register_op


@register_op("argmax_rows(Tensor logits) -> Tensor", axes="s v^ -> s", capturable=True)
def argmax_rows(logits: torch.Tensor) -> torch.Tensor:
    """logits [S, V] of any float type -> [S] int64: the first of the largest.

    -1 for a row with NaN, +inf or nothing above -inf.
    """
    best, token_ids = logits.max(-1)
    return torch.where(best.isfinite(), token_ids, -1)


@argmax_rows.fake
def _(logits: torch.Tensor) -> torch.Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)
