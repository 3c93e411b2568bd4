"""resolve_tokens in Triton: one launch, where torch takes five."""

from __future__ import annotations

import torch

from ..gpu import runs_triton
from .resolve_tokens import resolve_tokens


@resolve_tokens.implement(
    "triton", when=lambda choice: runs_triton(choice.device), priority=10, capturable=True
)
def resolve_tokens_triton(input_ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """As `resolve_tokens`; both contiguous int64."""
    from .step_kernel import resolve_tokens_kernel

    out = torch.empty_like(input_ids)
    block = 256
    grid = (-(-input_ids.numel() // block),)
    resolve_tokens_kernel[grid](input_ids, tokens, out, input_ids.numel(), BLOCK=block)
    return out
