"""rms_norm in C: one pass over each row, where torch takes six over all of them."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import torch

from ..native import Kernel
from ..op import Choice
from .rms_norm import rms_norm

_KERNEL = Kernel(Path(__file__).with_name("rms_norm.c"), "rms_norm")
# The C struct `Call`: 3 pointers, 8 integers, 2 floating-point numbers.
_CALL = struct.Struct("3Q8q2d")
_DTYPES = (torch.float32, torch.bfloat16)


def _applies(choice: Choice) -> bool:
    x, weight = choice.args["x"], choice.args["weight"]
    return (
        choice.device.type == "cpu"
        and x.dtype in _DTYPES
        and (weight is None or weight.dtype is x.dtype)
        and _KERNEL.ready("rms_norm", "reference")
    )


@rms_norm.implement("native_cpu", when=_applies, priority=1)
def native_cpu(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    cast_before_weight: bool = True,
) -> torch.Tensor:
    """As `rms_norm`; x and weight of one dtype, float32 or bfloat16."""
    width = x.shape[-1]
    if x.is_contiguous():
        outer, inner, outer_stride, inner_stride = math.prod(x.shape[:-1]), 1, width, 0
    elif x.dim() >= 3 and x.stride(-1) == 1 and math.prod(x.shape[:-3]) == 1:
        # Heads sliced out of a fused projection, read where they are.
        outer, inner, outer_stride, inner_stride = *x.shape[-3:-1], *x.stride()[-3:-1]
    else:
        x = x.contiguous()
        outer, inner, outer_stride, inner_stride = math.prod(x.shape[:-1]), 1, width, 0
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    out = x.new_empty(x.shape)
    _KERNEL(
        _CALL.pack(
            x.data_ptr(), 0 if weight is None else weight.data_ptr(), out.data_ptr(),
            outer, inner, width, outer_stride, inner_stride, x.dtype is torch.bfloat16,
            cast_before_weight, torch.get_num_threads(), eps, offset,
        )
    )  # fmt: skip
    return out
