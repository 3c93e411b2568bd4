"""Joins of whole parameters become one weight each, made when it is loaded and not at every step.

    a = weight x.0; b = weight x.1; c = aten.cat([a, b])
becomes
    c = weight x.0 + x.1
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx

from ..program import Program, Weight
from ..transform import is_call

aten = torch.ops.aten


def join_weights(program: Program) -> None:
    """Rewrites every `cat` that reads nothing but weights, or views of them."""
    for node in list(program.graph.nodes):
        if not is_call(node, aten.cat.default):
            continue
        parts: list[Any] = node.args[0]
        weights = [_weight(program, part) for part in parts]
        shape = tuple(node.meta["val"].shape)
        dimension = int(node.args[1]) % len(shape) if len(node.args) > 1 else 0
        if any(weight is None for weight in weights):
            continue
        pieces = tuple(weight.pieces[0] for weight in weights if weight is not None)
        joined = Weight(pieces, shape, node.meta["val"].dtype, dimension)
        name = re.sub(r"\W", "_", f"{pieces[0]}_and_{len(pieces) - 1}_more_{node.name}")
        node.replace_all_uses_with(program.add_weight(name, joined, node))
    program.remove_unused()


def _weight(program: Program, node: Any) -> Weight | None:
    """The weight of one piece that a node is, or is a view of."""
    if is_call(node, aten.view.default, aten.reshape.default):
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    weight = program.weights.get(str(node.target))
    return weight if weight is not None and len(weight.pieces) == 1 else None
