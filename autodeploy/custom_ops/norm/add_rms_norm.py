"""A residual sum and an RMS norm next to each other, in either order: one pass over the rows."""

from __future__ import annotations

import torch

from ..op import register_op
from .rms_norm import rms_norm


@register_op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset=0.0, "
    "bool cast_before_weight=True) -> (Tensor, Tensor)",
    axes="... d^, ... d^, d^ -> ... d^, ... d^",
    capturable=True,
)
def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    cast_before_weight: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and residual [..., D] -> rms_norm(x + residual), x + residual: what a next layer reads.

    The sum is rounded to the dtype of x and residual before it is normalised (see `rms_norm`).
    """
    total = x + residual
    return rms_norm.reference(total, weight, eps, offset, cast_before_weight), total


@register_op(
    "rms_norm_add(Tensor x, Tensor? weight, Tensor residual, float eps, float offset=0.0, "
    "bool cast_before_weight=True) -> Tensor",
    axes="... d^, d^, ... d^ -> ... d^",
    capturable=True,
)
def rms_norm_add(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    residual: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    cast_before_weight: bool = True,
) -> torch.Tensor:
    """x and residual [..., D] -> residual + rms_norm(x) [..., D]: a layer that is normed last."""
    return residual + rms_norm.reference(x, weight, eps, offset, cast_before_weight)


@add_rms_norm.fake
def _(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, *others: object
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return _normed(total, weight, others), total


@rms_norm_add.fake
def _(
    x: torch.Tensor, weight: torch.Tensor | None, residual: torch.Tensor, *others: object
) -> torch.Tensor:
    normed = _normed(x, weight, others)
    return x.new_empty(x.shape, dtype=torch.promote_types(normed.dtype, residual.dtype))


def _normed(
    x: torch.Tensor, weight: torch.Tensor | None, others: tuple[object, ...]
) -> torch.Tensor:
    assert rms_norm.shape_rule is not None
    return rms_norm.shape_rule(x, weight, *others)
