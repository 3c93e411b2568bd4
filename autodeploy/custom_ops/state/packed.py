"""What launches over packed sequences share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import gpu
from ..op import OpError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def whole_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, such that each row of its first dimension is in one piece.

    Slices of a fused projection are, and stay where they are.
    """
    expected = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


def check_rows(cache: Tensor) -> Tensor:
    """A cache [slots, ...] whose rows are in one piece; slots may have gaps between them.

    Raises:
        OpError: they are not, and a copy would not be written to.
    """
    if whole_rows(cache) is not cache:
        raise OpError("the rows of a cache of states must be contiguous; allocate them as such")
    return cache


def new_output(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype, sequences: int) -> Tensor:
    """An output [T, ...]. Rows past the last sequence are zeros.

    With as many rows as sequences, as in decoding, the kernel writes those zeros itself: no other
    launch.
    """
    make = torch.empty if shape[0] == sequences else torch.zeros
    return make(shape, dtype=dtype, device=like.device)


def launch_options() -> dict[str, Any]:
    """Keywords of a launch that may overlap the end of the one before it."""
    return {"PDL": True, "launch_pdl": True} if gpu.overlaps_launches() else {"PDL": False}


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()
