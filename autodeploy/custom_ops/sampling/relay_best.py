"""relay_best: the most likely tokens, written where the next step and the host look for them."""

from __future__ import annotations

import torch

from ..op import register_op
from .argmax_rows import argmax_rows


@register_op(
    "relay_best(Tensor logits, Tensor slots, Tensor turn, Tensor(a!) newest, Tensor(b!) answers) "
    "-> Tensor",
    capturable=True,
)
def relay_best(
    logits: torch.Tensor,
    slots: torch.Tensor,
    turn: torch.Tensor,
    newest: torch.Tensor,
    answers: torch.Tensor,
) -> torch.Tensor:
    """argmax_rows of logits [B, V], which it also leaves in two places.

    newest [slots] int64 gets them at slots [B] int64, 0 for -1; answers [turns, S >= B] int64, on
    the device or in pinned memory, at turn [1] int64, -1 as it is.
    """
    tokens = argmax_rows.reference(logits)
    newest.index_copy_(0, slots, tokens.clamp(min=0))
    copy = answers.to(turn.device, non_blocking=True)
    copy[:, : len(tokens)].index_copy_(0, turn, tokens[None])
    answers.copy_(copy, non_blocking=True)
    return tokens


@relay_best.fake
def _(
    logits: torch.Tensor,
    slots: torch.Tensor,
    turn: torch.Tensor,
    newest: torch.Tensor,
    answers: torch.Tensor,
) -> torch.Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)
