"""Which dimension of a tensor of heads is which, followed through views.

A tensor of heads has tokens `t`, heads `h` and a head's numbers `d`, in any order, and dimensions
of one element anywhere between. Views that only reorder dimensions, or add and remove those of one
element, keep track of them; others end the walk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .program import Program
from .transform import is_call

aten = torch.ops.aten

Axes = tuple[str | None, ...]
"""For each dimension 't', 'h' or 'd'; None for others, which have one element."""


@dataclass(frozen=True)
class Order:
    """A node whose value is a tensor of heads, and its dimensions."""

    node: fx.Node
    axes: Axes

    @classmethod
    def of(cls, node: fx.Node) -> Order:
        """A node that is [T, H, D]."""
        return cls(node, ("t", "h", "d"))

    def is_laid_out(self, axes: tuple[str, str, str]) -> bool:
        """Whether the dimensions are [1, *axes]; one head may be in any place of its own."""
        shape = self.node.meta["val"].shape
        expected: Axes = (None, *axes)
        return len(shape) == 4 and all(
            have == want or (_is_one(size) and have in (None, "h") and want in (None, "h"))
            for have, want, size in zip(self.axes, expected, shape, strict=True)
        )


def through_views(order: Order, alone: bool = False) -> Order:
    """The first tensor behind a chain of views that has the same elements in known dimensions.

    alone: every view on the way has one reader.
    """
    while True:
        source = _before(order)
        if source is None or (alone and len(order.node.users) != 1):
            return order
        order = source


def in_order(program: Program, order: Order, before: fx.Node) -> fx.Node:
    """A view [T, H, D]: nothing is copied."""
    node, axes = order.node, list(order.axes)
    if "h" not in axes:
        # A single head has lost its dimension: any of one element will do.
        axes[axes.index(None)] = "h"
    wanted = [index for index, axis in enumerate(axes) if axis is None]
    extra = len(wanted)
    wanted += [axes.index(axis) for axis in ("t", "h", "d")]
    if wanted != sorted(wanted):
        node = program.call(aten.permute.default, node, wanted, before=before, like=before)
    for _ in range(extra):
        node = program.call(aten.squeeze.dim, node, 0, before=before, like=before)
    return node


def _before(order: Order) -> Order | None:
    """The tensor that `order.node` is a view of; None if it is no such view."""
    node = order.node
    source: Any = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), torch.Tensor):
        return None
    shape, rank = source.meta["val"].shape, source.meta["val"].dim()
    axes: list[str | None] = list(order.axes)
    if is_call(node, aten.transpose.int):
        first, second = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
        axes[first], axes[second] = axes[second], axes[first]
    elif is_call(node, aten.permute.default):
        places = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
        axes = [order.axes[places.index(d)] for d in range(rank)]
    elif is_call(node, aten.squeeze.dim):
        place = int(node.args[1]) % rank  # type: ignore[arg-type]
        if not _is_one(shape[place]):
            return None
        axes.insert(place, None)
    elif is_call(node, aten.unsqueeze.default):
        place = int(node.args[1]) % (rank + 1)  # type: ignore[arg-type]
        if axes.pop(place) is not None:
            return None
    elif is_call(node, aten.reshape.default, aten.view.default):
        return _reshaped(order, source)
    else:
        return None
    return Order(source, tuple(axes))


def _reshaped(order: Order, source: fx.Node) -> Order | None:
    """Through a reshape that only adds or removes dimensions of one element."""
    was, now = source.meta["val"].shape, order.node.meta["val"].shape
    kept = [axis for axis, size in zip(order.axes, now, strict=True) if not _is_one(size)]
    # Symbols compare by expression: never ask the shape environment, which would guard.
    if [str(s) for s in was if not _is_one(s)] != [str(s) for s in now if not _is_one(s)]:
        return None
    names = iter(kept)
    axes = tuple(None if _is_one(size) else next(names) for size in was)
    return Order(source, axes) if {"t", "d"} <= set(axes) else None


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1
