"""Walks along a graph: from a node to what it is a view or a cast of, and to what reads it."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from .transform import is_call

aten = torch.ops.aten

VIEWS = frozenset(
    {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.squeeze.dim,
     aten.unsqueeze.default, aten.flatten.using_ints, aten.unflatten.int}
)  # fmt: skip
"""The same numbers in the same order in another shape."""
_CASTS = frozenset({aten._to_copy.default, aten.to.dtype})
MOVES = VIEWS | {
    aten.transpose.int, aten.permute.default, aten.split_with_sizes.default, aten.split.Tensor,
    aten.chunk.default, aten.slice.Tensor, aten.narrow.default, aten.repeat_interleave.self_int,
    aten.expand.default, aten.clone.default, aten.contiguous.default, aten.cat.default,
    operator.getitem,
}  # fmt: skip


def behind_views(node: fx.Node) -> fx.Node:
    """The first node of a chain of views that ends in `node`."""
    while is_call(node, *VIEWS):
        node = node.args[0]  # type: ignore[assignment]
    return node


def behind_casts(node: Any) -> fx.Node:
    """What a float32 tensor was made of by widening it."""
    while is_call(node, *_CASTS) and node.meta["val"].dtype is torch.float32:
        node = node.args[0]
    return node


def operands(node: Any, target: Any) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Both orders of the two tensors of a sum or product; nothing if `node` is none."""
    if is_call(node, target) and not node.kwargs and len(node.args) == 2:
        first, second = node.args
        if isinstance(first, fx.Node) and isinstance(second, fx.Node):
            yield first, second
            yield second, first


def negated_exponent(node: Any) -> fx.Node | None:
    """The weight [H] of -exp(weight), in float32."""
    if not is_call(node, aten.neg.default) or not is_call(node.args[0], aten.exp.default):
        return None
    weight = behind_casts(node.args[0].args[0])
    single = node.meta["val"].dtype is torch.float32
    return weight if single and weight.op == "get_attr" and weight.meta["val"].dim() == 1 else None


def leads_only_to(node: fx.Node, goal: fx.Node) -> bool:
    """Whether nothing but `goal` reads a tensor, past ops that only move its numbers."""
    return all(
        user is goal or (is_call(user, *MOVES) and leads_only_to(user, goal)) for user in node.users
    )


def drop_calls(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Erases calls that write to caches, whose work another does now, and what only leads to them.

    Dead code stays where a call has an effect, so it is not left to the driver.
    """
    gone = set(nodes)
    pending = [user for node in nodes for user in node.users]
    while pending:
        node = pending.pop()
        if node not in gone:
            gone.add(node)
            pending += node.users
    for node in reversed(list(graph.nodes)):
        if node in gone and not node.users:
            graph.erase_node(node)
