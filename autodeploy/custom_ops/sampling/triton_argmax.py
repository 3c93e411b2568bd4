"""argmax_rows in Triton: rows in parts, so that one row keeps the whole device reading."""

from __future__ import annotations

import torch

from .. import gpu
from ..op import Choice
from .argmax_rows import argmax_rows

_BLOCK = 2048
_MOST_PARTS = 64


def _applies(choice: Choice) -> bool:
    return gpu.runs_triton(choice.device)


@argmax_rows.implement("triton", when=_applies, priority=10, capturable=True)
def argmax_rows_triton(logits: torch.Tensor) -> torch.Tensor:
    """As `argmax_rows`; the last stride of logits is 1."""
    from .argmax_kernel import best_of_parts_kernel, best_of_row_kernel

    rows, vocab = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    # Two programs a multiprocessor, or a block each.
    wanted = max(1, 2 * gpu.multiprocessors() // max(rows, 1))
    blocks = -(-vocab // _BLOCK)
    per_part = -(-blocks // min(wanted, blocks, _MOST_PARTS))
    parts = -(-blocks // per_part)
    values = torch.empty((rows, parts), dtype=torch.float32, device=logits.device)
    places = torch.empty((rows, parts), dtype=torch.int32, device=logits.device)
    best_of_parts_kernel[(rows, parts)](
        logits, values, places, vocab, logits.stride(0), per_part, parts, BLOCK=_BLOCK
    )
    best_of_row_kernel[(rows,)](values, places, out, parts, PARTS=_MOST_PARTS)
    return out
