"""mask_logits: forbids the tokens whose bit is not set, in some of the rows."""

from __future__ import annotations

import numpy as np
import torch

from ..op import Choice, register_op


@register_op("mask_logits(Tensor(a!) logits, Tensor bits, Tensor rows) -> ()", capturable=True)
def mask_logits(logits: torch.Tensor, bits: torch.Tensor, rows: torch.Tensor) -> None:
    """Sets logits[rows[m], v] to -inf where bit v % 32, from the lowest, of bits[m, v // 32] is 0.

    logits [N, V] of any float type, changed in place; bits [M, ceil(V / 32)] int32; rows [M]
    int64, each at most once. Rows that are not named stay as they are.
    """
    places = torch.arange(32, dtype=torch.int32, device=bits.device)
    allowed = ((bits[:, :, None] >> places) & 1).flatten(1)[:, : logits.shape[1]].bool()
    logits.index_copy_(0, rows, logits[rows].masked_fill_(~allowed, -torch.inf))


@mask_logits.fake
def _(logits: torch.Tensor, bits: torch.Tensor, rows: torch.Tensor) -> None:
    return None


def _on_cpu(choice: Choice) -> bool:
    return choice.device.type == "cpu"


@mask_logits.implement("unpacked", when=_on_cpu, priority=5)
def mask_logits_unpacked(logits: torch.Tensor, bits: torch.Tensor, rows: torch.Tensor) -> None:
    """As `mask_logits`, with numpy's way of taking bits apart: a fifth of the time."""
    forbidden = np.unpackbits((~bits).numpy().view(np.uint8), axis=1, bitorder="little")
    masks = torch.from_numpy(forbidden[:, : logits.shape[1]].view(np.bool_))
    for row, mask in zip(rows.tolist(), masks, strict=True):
        logits[row].masked_fill_(mask, -torch.inf)
