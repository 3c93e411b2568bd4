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
_MOVES = VIEWS | {
    aten.transpose.int, aten.permute.default, aten.split_with_sizes.default, aten.split.Tensor,
    aten.chunk.default, aten.slice.Tensor, aten.narrow.default, aten.repeat_interleave.self_int,
    aten.expand.default, aten.clone.default, aten.contiguous.default, operator.getitem,
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


def only_reader(node: fx.Node) -> fx.Node | None:
    """The one node that reads a tensor, past views that it alone reads."""
    while len(node.users) == 1:
        (user,) = node.users
        if not is_call(user, *VIEWS):
            return user
        node = user
    return None


def leads_only_to(node: fx.Node, goal: fx.Node) -> bool:
    """Whether nothing but `goal` reads a tensor, past ops that only move its numbers."""
    return all(
        user is goal or (is_call(user, *_MOVES) and leads_only_to(user, goal))
        for user in node.users
    )
