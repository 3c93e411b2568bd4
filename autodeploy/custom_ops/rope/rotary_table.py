"""rotary_table: cosines and sines of every token's position, for `rope`."""

from __future__ import annotations

import torch

from ..op import register_op


@register_op(
    "rotary_table(Tensor position_ids, Tensor inv_freq, float scaling, str layout, "
    "ScalarType dtype) -> (Tensor, Tensor)",
    axes="b t, f^ -> b t r^, b t r^",
    capturable=True,
)
def rotary_table(
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    scaling: float,
    layout: str,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """position_ids [1, T] of integers, inv_freq [F] -> cos and sin [1, T, R] in `dtype`.

    Angles, cosines and the product with `scaling` are in float32. layout: 'halves' has every
    frequency at i and i + F (R = 2F), 'pairs' at 2i and 2i + 1 (R = 2F), 'once' at i (R = F).
    """
    angles = position_ids.float()[..., None] * inv_freq.float()
    if layout == "halves":
        angles = torch.cat((angles, angles), dim=-1)
    elif layout == "pairs":
        angles = angles.repeat_interleave(2, dim=-1)
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


@rotary_table.fake
def _(
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    scaling: float,
    layout: str,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    width = inv_freq.shape[0] * (1 if layout == "once" else 2)
    shape = (*position_ids.shape, width)
    return inv_freq.new_empty(shape, dtype=dtype), inv_freq.new_empty(shape, dtype=dtype)
