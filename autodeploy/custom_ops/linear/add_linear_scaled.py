"""add_linear_scaled: add_linear that also leaves what the product after the next norm needs.

A norm multiplies each row by one number, which a product may as well do to its sums:

    linear(rms_norm(r, w), v) = linear(r * w, v) * rsqrt(mean(r²) + eps)

Whoever finishes the residual stream r has its numbers in registers, and writes r * w and the sums
of squares at no cost. With some tokens a norm is a launch less then, and rows come to the next
product as they are multiplied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..op import register_op
from .add_linear import add_linear
from .skinny_config import SQUARE_COLUMNS


@register_op(
    "add_linear_scaled(Tensor(a!) residual, Tensor x, Tensor weight, Tensor? bias=None, "
    "Tensor? norm_weight=None, bool norm=False, float eps=0.0, float norm_offset=0.0, "
    "bool cast_before_weight=True, str activation='', bool gated=False, "
    "Tensor? next_weight=None, float next_offset=0.0, bool next_cast_before_weight=True) "
    "-> (Tensor, Tensor)",
    capturable=True,
)
def add_linear_scaled(
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
    next_weight: torch.Tensor | None = None,
    next_offset: float = 0.0,
    next_cast_before_weight: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `add_linear`; returns scaled [..., N] and squares [..., P], for `fused_linear`.

    The next norm has next_weight [N] or none, and its offset and rounding, as in `rms_norm`.
    scaled: the residual as it is stored times the norm's weight, in the product's dtype. squares:
    float32; their sum over P is that of the row's squares. P: N by `SQUARE_COLUMNS`, rounded up.
    An implementation may leave both without values where none of `fused_linear` reads them.
    """
    add_linear.reference(
        residual, x, weight, bias, norm_weight, norm, eps, norm_offset, cast_before_weight,
        activation, gated,
    )  # fmt: skip
    stream = residual.float()
    scale = scale_of(next_weight, next_offset, next_cast_before_weight)
    scaled = stream if scale is None else stream * scale
    # A copy, also in float32: results share no memory with arguments.
    return scaled.to(weight.dtype, copy=True), squares_of(stream)


def scale_of(weight: torch.Tensor | None, offset: float, rounded: bool) -> torch.Tensor | None:
    """What a norm multiplies rows by [N], float32; None if by nothing but the root."""
    if weight is None:
        return None
    if rounded:
        return (weight if offset == 0.0 else offset + weight).float()
    return offset + weight.float()


def squares_of(stream: torch.Tensor) -> torch.Tensor:
    """Partial sums of squares [.., P] of rows [.., N], float32."""
    padding = -stream.shape[-1] % SQUARE_COLUMNS
    return F.pad(stream, (0, padding)).square().unflatten(-1, (-1, SQUARE_COLUMNS)).sum(-1)


@add_linear_scaled.fake
def _(
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    *others: object,
    **named: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    *before, columns = residual.shape
    numbers = -(-columns // SQUARE_COLUMNS)
    scaled = residual.new_empty(residual.shape, dtype=weight.dtype)
    return scaled, residual.new_empty((*before, numbers), dtype=torch.float32)
