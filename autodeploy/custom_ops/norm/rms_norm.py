"""rms_norm: scales each row to unit root mean square (Zhang and Sennrich, 2019)."""

from __future__ import annotations

import torch

from ..op import register_op


@register_op(
    "rms_norm(Tensor x, Tensor? weight, float eps, float offset=0.0, "
    "bool cast_before_weight=True) -> Tensor",
    axes="... d^, d^ -> ... d^",
    capturable=True,
)
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    cast_before_weight: bool = True,
) -> torch.Tensor:
    """x [..., D], weight [D] or None -> [..., D] in x's dtype; the mean is in float32.

    offset: the row is multiplied by offset + weight. cast_before_weight: the row returns to x's
    dtype before that product, or only after it; the two round differently in bfloat16.
    """
    row = x.float()
    row = row * torch.rsqrt(row.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return row.to(x.dtype)
    if cast_before_weight:
        scale = weight if offset == 0.0 else offset + weight
        return scale * row.to(x.dtype)
    return (row * (offset + weight.float())).to(x.dtype)


@rms_norm.fake
def _(x: torch.Tensor, weight: torch.Tensor | None, *others: object) -> torch.Tensor:
    cast_before_weight = others[2] if len(others) > 2 else True
    dtype = x.dtype
    if weight is not None and cast_before_weight:
        dtype = torch.promote_types(dtype, weight.dtype)
    return x.new_empty(x.shape, dtype=dtype)
