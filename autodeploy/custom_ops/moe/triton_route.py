"""route in Triton: one launch, where torch takes five or more."""

from __future__ import annotations

from typing import Any

import torch

from .. import gpu
from ..op import Choice
from .route import route

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Probabilities that one program holds, and the most choices it unrolls.
_TILE, MAX_EXPERTS, MAX_CHOICES = 512, 512, 32


def _applies(choice: Choice) -> bool:
    logits = choice.args["logits"]
    return (
        gpu.runs_triton(choice.device)
        and logits.dtype in _DTYPES
        and choice.args["dtype"] in _DTYPES
        and isinstance(logits.shape[-1], int)
        and (choice.args["gate"] or logits.shape[-1]) <= MAX_EXPERTS
        and choice.args["k"] + choice.args["shared"] <= MAX_CHOICES
    )


@route.implement("triton", when=_applies, priority=10, capturable=True)
def route_rows(
    logits: torch.Tensor,
    k: int,
    normalize: bool,
    dtype: torch.dtype,
    shared: int = 0,
    gate: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `route`; at most 512 experts and 32 choices. Of equal ones the lower index is first."""
    from .route_kernel import route_kernel

    experts = gate or logits.shape[-1]
    rows = logits.reshape(-1, logits.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    shape = (*logits.shape[:-1], shared + k)
    index = torch.empty(shape, dtype=torch.int64, device=logits.device)
    weights = torch.empty(shape, dtype=dtype, device=logits.device)
    if rows.shape[0] == 0:
        return index, weights
    block = max(16, 1 << (experts - 1).bit_length())
    # A token a program while tokens are few: then time is latency.
    block_tokens = max(1, _TILE // block) if rows.shape[0] > 512 else 1
    pdl = gpu.overlaps_launches()
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    route_kernel[(-(-rows.shape[0] // block_tokens),)](
        rows, index, weights, rows.shape[0], rows.stride(0),
        EXPERTS=experts, CHOICES=k, SHARED=shared, GATED=gate > 0, NORMALIZE=normalize,
        BLOCK_TOKENS=block_tokens, BLOCK_EXPERTS=block,
        BLOCK_CHOICES=1 << (shared + k - 1).bit_length(), PDL=pdl,
        num_warps=4 if block_tokens > 1 else 1, **options,
    )  # fmt: skip
    return index, weights
