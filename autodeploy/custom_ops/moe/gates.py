"""What experts do between their two products, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from ..op import OpError


def _relu_squared(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _linear(x: torch.Tensor) -> torch.Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _relu_squared,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "linear": _linear,
}
"""Activations by their names in transformers' ACT2FN, each function once."""


def gate(
    up: torch.Tensor, activation: str, interleaved: bool = False, limit: float = 0.0,
    alpha: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """up [..., 2I] -> [..., I]: activation(gate half) times the other half.

    interleaved: gates are the even columns. alpha > 0: gate · sigmoid(alpha · gate) · (other + 1)
    with the gate clamped from above by `limit` and the other half to ± limit (gpt-oss).
    """
    gates, others = (up[..., ::2], up[..., 1::2]) if interleaved else up.chunk(2, dim=-1)
    if limit:
        gates, others = gates.clamp(max=limit), others.clamp(-limit, limit)
    if alpha:
        return (others + 1) * (gates * torch.sigmoid(gates * alpha))
    return activate(gates, activation) * others


def activate(x: torch.Tensor, name: str) -> torch.Tensor:
    """Applies an activation by name."""
    if name not in ACTIVATIONS:
        raise OpError(f"experts: no activation '{name}'; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name](x)
