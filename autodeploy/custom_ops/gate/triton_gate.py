"""gated_activation in Triton: both halves read once, where torch writes one between two kernels."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import gpu
from ..moe.gates import ACTIVATIONS
from ..norm.triton_norm import rows_of
from ..op import Choice
from .gated_activation import gated_activation

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 1024


def _applies(choice: Choice) -> bool:
    return (
        gpu.runs_triton(choice.device)
        and choice.args["x"].dtype in _DTYPES
        and choice.args["activation"] in ACTIVATIONS
    )


@gated_activation.implement("triton", when=_applies, priority=10, capturable=True)
def gate_rows(
    x: torch.Tensor, activation: str, block: int = _BLOCK, num_warps: int = 4
) -> torch.Tensor:
    """As `gated_activation`; rows may be strided."""
    from .activation_kernel import gate_kernel

    width = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    rows = math.prod(x.shape[:-1])
    if rows == 0 or width == 0:
        return out
    x, inner, outer_stride, inner_stride = rows_of(x)
    block = min(block, 1 << (width - 1).bit_length())
    pdl = gpu.overlaps_launches()
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    gate_kernel[(rows, -(-width // block))](
        x, out, x, rows, inner, outer_stride, inner_stride, 0,
        WIDTH=width, BLOCK=block, ACTIVATION=activation, SCALED=False, PDL=pdl,
        num_warps=num_warps, **options,
    )  # fmt: skip
    return out
