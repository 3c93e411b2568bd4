"""add_linear: fused_linear with a residual that the result overwrites.

cuBLAS adds a product onto what its output holds. Where nothing reads the residual afterwards, it
can be that output: no copy of it is made, and one tensor fewer is in the caches.
"""

from __future__ import annotations

import torch

from ..op import register_op
from .fused_linear import fused_linear


@register_op(
    "add_linear(Tensor(a!) residual, Tensor x, Tensor weight, Tensor? bias=None, "
    "Tensor? norm_weight=None, bool norm=False, float eps=0.0, float norm_offset=0.0, "
    "bool cast_before_weight=True, str activation='', bool gated=False) -> ()",
    capturable=True,
)
def add_linear(
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm: bool = False,
    eps: float = 0.0,
    norm_offset: float = 0.0,
    cast_before_weight: bool = True,
    activation: str = "",
    gated: bool = False,
) -> None:
    """Overwrites residual [..., N], or [..., N / 2] if gated, with what `fused_linear` returns.

    residual shares no memory with the other tensors and has the result's dtype.
    """
    residual.copy_(
        fused_linear.reference(
            x, weight, bias, norm_weight, norm, eps, norm_offset, cast_before_weight, activation,
            gated, residual,
        )
    )  # fmt: skip


@add_linear.fake
def _(
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm: bool = False,
    eps: float = 0.0,
    norm_offset: float = 0.0,
    cast_before_weight: bool = True,
    activation: str = "",
    gated: bool = False,
) -> None:
    return None
