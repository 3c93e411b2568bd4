"""Choosing tokens in Triton: no sort, no wait, the same token in any batch."""

from __future__ import annotations

from typing import Any

import torch

from .. import gpu
from ..op import Choice
from .argmax_rows import argmax_rows
from .mask_logits import mask_logits
from .relay_best import relay_best
from .sample_rows import sample_rows

_ZERO_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
"""Bits at the end of a float32 made of the type that are always zero."""


def _applies(choice: Choice) -> bool:
    return gpu.runs_triton(choice.device)


@argmax_rows.implement("triton", when=_applies, priority=10, capturable=True)
def argmax_rows_triton(logits: torch.Tensor) -> torch.Tensor:
    """As `argmax_rows`."""
    return argmax_parts(logits)


@relay_best.implement("triton", when=_applies, priority=10, capturable=True)
def relay_best_triton(
    logits: torch.Tensor,
    slots: torch.Tensor,
    turn: torch.Tensor,
    newest: torch.Tensor,
    answers: torch.Tensor,
) -> torch.Tensor:
    """As `relay_best`; all but the logits contiguous."""
    return argmax_parts(logits, (slots, turn, newest, answers))


def argmax_parts(
    logits: torch.Tensor,
    relay: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    *,
    block: int = 2048,
    programs: int = 1024,
    num_warps: int = 4,
    stages: int = 2,
) -> torch.Tensor:
    """`argmax_rows`, with about `programs` programs that read blocks of `block`.

    relay: the other arguments of `relay_best`, to do that.
    """
    from .argmax_kernel import argmax_merge_kernel, argmax_part_kernel

    logits = _readable(logits)
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return tokens
    blocks = -(-vocab // block)
    each = -(-blocks // min(blocks, max(1, programs // rows)))
    parts = -(-blocks // each)
    values = torch.empty((rows, parts), dtype=torch.float32, device=logits.device)
    ids = torch.empty((rows, parts), dtype=torch.int32, device=logits.device)
    options = _overlap()
    argmax_part_kernel[(rows, parts)](
        logits, values, ids, vocab, logits.stride(0), each,
        BLOCK=block, STAGES=stages, num_warps=num_warps, **options,
    )  # fmt: skip
    slots, turn, newest, answers = relay or (tokens,) * 4
    argmax_merge_kernel[(rows,)](
        values, ids, tokens, slots, turn, newest, answers, parts, answers.shape[-1],
        BLOCK=_power_of_two(blocks), RELAY=relay is not None, num_warps=1, **options,
    )  # fmt: skip
    return tokens


@sample_rows.implement("triton", when=_applies, priority=10, capturable=True)
def sample_rows_triton(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    number: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    """As `sample_rows`; the row parameters and tokens contiguous."""
    sample_by_search(logits, temperature, top_k, top_p, min_p, number, tokens)


def sample_by_search(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    number: torch.Tensor,
    tokens: torch.Tensor,
    *,
    block: int = 4096,
    ways: int = 8,
    num_warps: int = 16,
    stages: int = 3,
) -> None:
    """`sample_rows`, reading blocks of `block` and dividing by `ways` + 1 at a time.

    The order of sums follows from these alone: do not let them depend on the number of rows.
    """
    from .sample_kernel import sample_kernel

    logits = _readable(logits)
    rows, vocab = logits.shape
    if not rows:
        return
    sample_kernel[(rows,)](
        logits, temperature, top_k, top_p, min_p, number, tokens, vocab, logits.stride(0),
        SHIFT=_ZERO_BITS[logits.dtype], BLOCK=block, BLOCKS=_power_of_two(-(-vocab // block)),
        WAYS=ways, STAGES=stages, num_warps=num_warps, **_overlap(),
    )  # fmt: skip


@mask_logits.implement("triton", when=_applies, priority=10, capturable=True)
def mask_logits_triton(logits: torch.Tensor, bits: torch.Tensor, rows: torch.Tensor) -> None:
    """As `mask_logits`; bits and rows contiguous, no gaps inside a row of logits."""
    mask_in_blocks(logits, bits, rows)


def mask_in_blocks(
    logits: torch.Tensor,
    bits: torch.Tensor,
    rows: torch.Tensor,
    *,
    block: int = 4096,
    num_warps: int = 8,
) -> None:
    """`mask_logits`, a program per `block` tokens of a row."""
    from .mask_kernel import mask_kernel

    if not len(rows):
        return
    vocab = logits.shape[1]
    mask_kernel[(len(rows), -(-vocab // block))](
        logits, bits, rows, vocab, logits.stride(0), bits.shape[1],
        BLOCK=block, num_warps=num_warps, **_overlap(),
    )  # fmt: skip


def _readable(logits: torch.Tensor) -> torch.Tensor:
    """In a type that the kernels know, without gaps inside a row."""
    if logits.dtype not in _ZERO_BITS:
        logits = logits.float()
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _power_of_two(count: int) -> int:
    """The first one that is at least `count`, and at least 2: a scan wants more than one."""
    return max(2, 1 << (count - 1).bit_length())


def _overlap() -> dict[str, Any]:
    return {"PDL": True, "launch_pdl": True} if gpu.overlaps_launches() else {"PDL": False}
