"""Gated MLPs as a graph spells them out, with a gate of their rows perhaps.

    a = linear(x, w1); b = linear(x, w2)            # or halves of one linear
    y = mul(sigmoid(linear(x, gate)), linear(mul(silu(a), b), w3))

Seen before linears are joined or take in what follows them; halves also afterwards.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .transform import is_call
from .walk import VIEWS, behind_views, operands

aten = torch.ops.aten

_SPLITS = frozenset({aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default})
_ACTIVATIONS: dict[Any, str] = {
    aten.silu.default: "silu",
    aten.relu.default: "relu",
    aten.relu6.default: "relu6",
    aten.mish.default: "mish",
    aten.hardswish.default: "hardswish",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
}
_Linear = tuple[fx.Node, fx.Node]
"""What it reads and its weight, an attribute."""


@dataclass(frozen=True)
class GatedMlp:
    """A gated MLP over weights without biases, perhaps times the sigmoid of a gate [.., 1]."""

    x: fx.Node
    """Behind all views of it."""
    activation: str
    sides: tuple[fx.Node, ...]
    """Weights [W, H] of the activated half and the other, or one of both, [2 W, H]."""
    last: fx.Node
    """Weight [H, W]."""
    gate: fx.Node | None
    """Weight [1, H]."""
    calls: frozenset[fx.Node]
    """All that make it."""


def gated_mlp(node: fx.Node) -> GatedMlp | None:
    """The MLP that `node` is a view of; None if it is none."""
    calls: set[fx.Node] = set()
    product, gate = _behind(node, calls), None
    for scale, scaled in operands(product, aten.mul.Tensor):
        if is_call(scale, aten.sigmoid.default):
            calls |= {product, scale}
            gate = _linear(_behind(scale.args[0], calls), calls)
            if gate is None or gate[1].meta["val"].shape[0] != 1:
                return None
            product = _behind(scaled, calls)
            break
    outer = _linear(product, calls)
    found = None if outer is None else _sides(_behind(outer[0], calls), calls)
    if outer is None or found is None:
        return None
    activation, sides = found
    read = {behind_views(x) for x, _ in (*sides, *([gate] if gate else []))}
    if len(read) != 1:
        return None
    return GatedMlp(
        read.pop(), activation, tuple(weight for _, weight in sides), outer[1],
        gate[1] if gate else None, frozenset(calls),
    )  # fmt: skip


def _sides(inner: fx.Node, calls: set[fx.Node]) -> tuple[str, list[_Linear]] | None:
    """The activation of a gate, and the linears of its two sides, or of both in one."""
    halved = match_gate(inner)
    if halved is not None:
        source, name = halved
        pending = [inner]
        while pending:
            node = pending.pop()
            if node is not source:
                calls.add(node)
                pending += node.all_input_nodes
        both = _linear(_behind(source, calls), calls)
        return None if both is None else (name, [both])
    for active, other in operands(inner, aten.mul.Tensor):
        found = activation_of(active)
        if found is not None:
            calls |= {inner, active}
            first = _linear(_behind(active.args[0], calls), calls)
            second = _linear(_behind(other, calls), calls)
            return (found, [first, second]) if first and second else None
    return None


def _behind(node: Any, calls: set[fx.Node]) -> fx.Node:
    """What a node is a view of; the views are among the calls."""
    while is_call(node, *VIEWS):
        calls.add(node)
        node = node.args[0]
    return node


def _linear(node: fx.Node, calls: set[fx.Node]) -> _Linear | None:
    if not is_call(node, aten.linear.default) or len(node.args) != 2 or node.kwargs:
        return None
    x, weight = node.args
    calls.add(node)
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    return x, weight


def match_gate(product: fx.Node) -> tuple[fx.Node, str] | None:
    """The tensor [..., 2F] and the activation whose gate `product` is; None if it is none."""
    if not is_call(product, aten.mul.Tensor):
        return None
    for active, other in (product.args[:2], product.args[1::-1]):
        name = activation_of(active)
        if name is None or not isinstance(active, fx.Node) or len(active.users) != 1:
            continue
        gate = active.args[0]
        source, width = _half_of(gate, 0), _half_of(other, 1)
        if source is not None and source is width:
            return source, name
    return None


def activation_of(node: Any) -> str | None:
    """The name, in `moe.gates.ACTIVATIONS`, of the activation that a node calls."""
    if is_call(node, aten.gelu.default):
        approximate = node.kwargs.get("approximate", "none") if len(node.args) < 2 else node.args[1]
        return {"none": "gelu", "tanh": "gelu_pytorch_tanh"}.get(approximate)
    return _ACTIVATIONS.get(node.target) if isinstance(node, fx.Node) else None


def _half_of(node: Any, index: int) -> fx.Node | None:
    """The tensor whose first (0) or second (1) half along the last dimension a node is."""
    if not is_call(node, operator.getitem) or node.args[1] != index:
        return None
    parts = node.args[0]
    if not is_call(parts, *_SPLITS):
        return None
    source = parts.args[0]
    rank = source.meta["val"].dim()
    axis = parts.args[2] if len(parts.args) > 2 else parts.kwargs.get("dim", 0)
    widths = [str(part.shape[-1]) for part in parts.meta["val"]]
    alone = axis % rank == rank - 1 and len(widths) == 2 and widths[0] == widths[1]
    return source if alone else None
