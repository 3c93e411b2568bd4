"""RMS norms in Triton: each row is read once, held in registers, and written once.

On one H200 torch's composition takes seven kernels a norm; at one token this is a launch of a few
microseconds, at thousands it is bound by memory.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

from .. import gpu
from ..op import Choice
from .add_rms_norm import add_rms_norm, rms_norm_add
from .rms_norm import rms_norm

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_WIDTH = 16384
# Numbers one program holds when rows are narrow.
_TILE = 2048


def _applies(choice: Choice) -> bool:
    if not gpu.runs_triton(choice.device):
        return False
    x, weight = choice.args["x"], choice.args["weight"]
    return (
        x.dtype in _DTYPES
        and 0 < int(x.shape[-1]) <= _MAX_WIDTH
        and (weight is None or (weight.dtype in _DTYPES and weight.dim() == 1))
    )


def _applies_with_residual(choice: Choice) -> bool:
    if not _applies(choice):
        return False
    x, residual, weight = (choice.args[name] for name in ("x", "residual", "weight"))
    return (
        residual.dtype is x.dtype
        and residual.dim() == x.dim()
        and all(str(m) == str(n) for m, n in zip(x.shape, residual.shape, strict=True))
        and (weight is None or weight.dtype is x.dtype)
    )


@rms_norm.implement("triton", when=_applies, priority=10, capturable=True)
def rms_norm_rows(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    cast_before_weight: bool = True,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """As `rms_norm`; D at most 16384. Rows may be strided: heads of a fused projection.

    dtype: of the result, if it is to be rounded to another one.
    """
    return _norm("none", x, None, weight, eps, offset, cast_before_weight, dtype=dtype)[0]


@add_rms_norm.implement("triton", when=_applies_with_residual, priority=10, capturable=True)
def add_rms_norm_rows(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    cast_before_weight: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `add_rms_norm`; all of one dtype."""
    return _norm("before", x, residual, weight, eps, offset, cast_before_weight)


@rms_norm_add.implement("triton", when=_applies_with_residual, priority=10, capturable=True)
def rms_norm_add_rows(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    residual: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    cast_before_weight: bool = True,
) -> torch.Tensor:
    """As `rms_norm_add`; all of one dtype."""
    return _norm("after", x, residual, weight, eps, offset, cast_before_weight)[0]


def _norm(
    add: Literal["none", "before", "after"],
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    num_warps: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result and, if `add` is "before", the sum; otherwise the result twice."""
    from .norm_kernel import norm_kernel

    width = x.shape[-1]
    if dtype is None:
        dtype = x.dtype
        if weight is not None and cast_before_weight:
            dtype = torch.promote_types(dtype, weight.dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device) if add == "before" else out
    rows = math.prod(x.shape[:-1])
    if rows == 0:
        return out, total
    x, inner, *x_strides = rows_of(x)
    r_strides = [0, 0]
    if residual is not None:
        residual, r_inner, *r_strides = rows_of(residual)
        if r_inner != inner:
            # One of the two has gaps: both in one piece then.
            x, residual = x.contiguous(), residual.contiguous()
            inner, x_strides, r_strides = 1, [width, 0], [width, 0]
    if weight is not None and weight.stride(0) != 1:
        weight = weight.contiguous()
    block = 1 << (width - 1).bit_length()
    block_rows = max(1, _TILE // block)
    pdl = gpu.overlaps_launches()
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    norm_kernel[(-(-rows // block_rows),)](
        x, x if residual is None else residual, x if weight is None else weight, out, total,
        rows, inner, *x_strides, *r_strides, eps, offset,
        WIDTH=width, BLOCK_WIDTH=block, BLOCK_ROWS=block_rows, HAS_WEIGHT=weight is not None,
        HAS_OFFSET=offset != 0.0, CAST_BEFORE_WEIGHT=cast_before_weight, ADD=add, PDL=pdl,
        # Fused, a product and the sum after it would be rounded once, which torch does twice.
        enable_fp_fusion=False,
        num_warps=num_warps or min(16, max(4, block // 512)), **options,
    )  # fmt: skip
    return out, total


def rows_of(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """x [..., D] as rows that a kernel finds: the tensor, rows per group, and two strides.

    Row r is at (r // inner) * outer_stride + (r % inner) * inner_stride. A copy is made only of
    what has more strides than that.
    """
    groups: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if groups and groups[-1][1] == size * stride:
            groups[-1] = (groups[-1][0] * size, stride)
        else:
            groups.append((size, stride))
    if len(groups) > 2 or (x.stride(-1) != 1 and x.shape[-1] != 1):
        return x.contiguous(), 1, x.shape[-1], 0
    if len(groups) < 2:
        return x, 1, groups[0][1] if groups else x.shape[-1], 0
    (_, outer), (inner, step) = groups
    return x, inner, outer, step
