"""gated_activation: one half of each row, through an activation, times the other half."""

from __future__ import annotations

import torch

from ..moe.gates import activate
from ..op import register_op


@register_op("gated_activation(Tensor x, str activation) -> Tensor", capturable=True)
def gated_activation(x: torch.Tensor, activation: str) -> torch.Tensor:
    """x [..., 2F] -> activation(x[..., :F]) * x[..., F:] in x's dtype.

    activation: a name of `moe.gates.ACTIVATIONS`. Its result is rounded before the product.

    Raises:
        OpError: there is no activation of that name.
    """
    gates, others = x.chunk(2, dim=-1)
    return activate(gates, activation) * others


@gated_activation.fake
def _(x: torch.Tensor, activation: str) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
