"""A step's inputs in Triton: one launch each, where torch takes five and more."""

from __future__ import annotations

import torch

from ..gpu import runs_triton
from ..op import Choice
from .open_step import FIELDS, open_step
from .place_pages import place_pages
from .relay_tokens import relay_tokens
from .resolve_tokens import resolve_tokens


def _applies(choice: Choice) -> bool:
    return runs_triton(choice.device)


@resolve_tokens.implement("triton", when=_applies, priority=10, capturable=True)
def resolve_tokens_triton(input_ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """As `resolve_tokens`; both contiguous int64."""
    from .step_kernel import resolve_tokens_kernel

    out = torch.empty_like(input_ids)
    block = 256
    grid = (-(-input_ids.numel() // block),)
    resolve_tokens_kernel[grid](input_ids, tokens, out, input_ids.numel(), BLOCK=block)
    return out


@relay_tokens.implement("triton", when=_applies, priority=10, capturable=True)
def relay_tokens_triton(tokens: torch.Tensor, slots: torch.Tensor, newest: torch.Tensor) -> None:
    """As `relay_tokens`; all contiguous."""
    from .step_kernel import relay_tokens_kernel

    block = 256
    grid = (-(-len(tokens) // block),)
    relay_tokens_kernel[grid](tokens, slots, newest, len(tokens), BLOCK=block)


@open_step.implement("triton", when=_applies, priority=10, capturable=True)
def open_step_triton(
    letters: torch.Tensor, turn: torch.Tensor, newest: torch.Tensor, sequences: int
) -> tuple[torch.Tensor, ...]:
    """As `open_step`; all contiguous."""
    from .step_kernel import open_step_kernel

    turns, fields, width = letters.shape
    groups, device = fields - len(FIELDS), turn.device
    # Every row begins at an address of one kind, so that kernels compile for one kind.
    stride = -(-sequences // 16) * 16
    out = torch.empty((4, stride), dtype=torch.int64, device=device)
    lengths = torch.empty(sequences, dtype=torch.int32, device=device)
    pages = torch.empty((groups, stride), dtype=torch.int32, device=device)
    block = max(256, 1 << (sequences - 1).bit_length())
    open_step_kernel[(1,)](
        letters, turn, newest, out, lengths, pages, turns, width, sequences, stride,
        GROUPS=groups, ROWS=1 << (groups - 1).bit_length(), BLOCK=block, num_warps=8,
    )  # fmt: skip
    ids, positions, known, slots = out[:, :sequences].unbind()
    return ids[None], positions[None], known[None], lengths, slots, pages[:, :sequences]


@place_pages.implement("triton", when=_applies, priority=10, capturable=True)
def place_pages_triton(
    table: torch.Tensor,
    rows: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    page_size: int,
) -> torch.Tensor:
    """As `place_pages`; all contiguous. What lies behind a new token's column stays as it was."""
    from .step_kernel import place_pages_kernel

    places = torch.empty_like(slots)
    place_pages_kernel[(len(slots),)](
        table, rows, pages, slots, positions, places, table.shape[1],
        PAGE=page_size, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return places
