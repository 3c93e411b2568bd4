"""experts: each token through the few experts it was routed to, weighted and summed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..cost import Cost, ExpertsCost
from ..op import register_op
from .gates import activate, gate


@register_op(
    "experts(Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up, Tensor down, "
    "Tensor? gate_up_bias=None, Tensor? down_bias=None, str activation='silu', bool gated=True, "
    "bool interleaved=False, bool transposed=False, float limit=0.0, float alpha=0.0, "
    "int shared=0, Tensor? residual=None) -> Tensor",
    axes="t d^, t k^, t k^, e^ i^ d^, e^ d^ i^, e^ i^, e^ d^, t d^ -> t d^",
)
def experts(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    limit: float = 0.0,
    alpha: float = 0.0,
    shared: int = 0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, H], top_k_index int64 and top_k_weights [T, k] -> [T, H].

    gate_up [E, 2I, H] ([E, I, H] if not gated), down [E, H, I]; transposed: both with their last
    two dimensions swapped. Biases [E, 2I] and [E, H]. An index of E or more is an expert of
    another rank and adds nothing. Weights multiply what the experts return, and the sum is
    rounded once, as in transformers' batched and grouped experts. shared: that many of the first
    experts are every token's, and the first columns of top_k_index name them in order. residual
    [T, H], of x's dtype, is added to the sum; implementations may add it before they round.
    """
    hidden = x.new_zeros((*top_k_index.shape, x.shape[1]))
    for expert in range(gate_up.shape[0]):
        token, choice = (top_k_index == expert).nonzero(as_tuple=True)
        hidden[token, choice] = _expert(
            x[token], gate_up[expert], down[expert],
            None if gate_up_bias is None else gate_up_bias[expert],
            None if down_bias is None else down_bias[expert],
            activation, gated, interleaved, transposed, limit, alpha,
        )  # fmt: skip
    out = (hidden * top_k_weights[..., None]).sum(1).to(x.dtype)
    return out if residual is None else residual + out


@experts.fake
def _(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


def _cost(arguments: Mapping[str, Any]) -> Cost:
    names = ("gate_up", "down", "gate_up_bias", "down_bias")
    weights = [arguments[name] for name in names if arguments[name] is not None]
    shared, chosen = int(arguments["shared"]), int(arguments["top_k_index"].shape[1])
    routed = int(weights[0].shape[0]) - shared
    products = sum(w[0].numel() for w in weights[:2])
    size = sum(w[0].numel() * w.dtype.itemsize for w in weights)
    return Cost(
        weight_bytes=shared * size,
        token_flops=2 * chosen * products,
        experts=(ExpertsCost(size, routed, min(chosen - shared, routed)),),
    )


experts.cost = _cost


@experts.implement("sorted_cpu", when=lambda c: c.device.type == "cpu", priority=1)
def sorted_cpu(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    limit: float = 0.0,
    alpha: float = 0.0,
    shared: int = 0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Tokens sorted by expert, one product per expert that is hit: unhit weights stay unread."""
    tokens, chosen = top_k_index.shape
    flat = top_k_index.reshape(-1)
    order = flat.argsort(stable=True)
    total = gate_up.shape[0]
    counts = torch.bincount(flat.clamp(max=total), minlength=total + 1)[:total].tolist()
    gathered = x[order // chosen]
    hidden = gathered.new_zeros((tokens * chosen, x.shape[1]))
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        rows = slice(start, start + count)
        hidden[rows] = _expert(
            gathered[rows], gate_up[expert], down[expert],
            None if gate_up_bias is None else gate_up_bias[expert],
            None if down_bias is None else down_bias[expert],
            activation, gated, interleaved, transposed, limit, alpha,
        )  # fmt: skip
        start += count
    unsorted = torch.empty_like(hidden)
    unsorted[order] = hidden
    weighted = unsorted.view(tokens, chosen, x.shape[1]) * top_k_weights[..., None]
    out = weighted.sum(1).to(x.dtype)
    return out if residual is None else residual + out


def _expert(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None, activation: str, gated: bool, interleaved: bool,
    transposed: bool, limit: float, alpha: float,
) -> torch.Tensor:  # fmt: skip
    """x [n, H] through one expert."""
    first, second = (gate_up.T, down.T) if transposed else (gate_up, down)
    up = torch.nn.functional.linear(x, first, gate_up_bias)
    inner = gate(up, activation, interleaved, limit, alpha) if gated else activate(up, activation)
    return torch.nn.functional.linear(inner, second, down_bias)
