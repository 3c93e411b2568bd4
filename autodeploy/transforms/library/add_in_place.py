"""add_in_place: a product is added onto its residual where nothing reads that afterwards.

    total = fused_linear(x, weight, residual=residual)
becomes
    add_linear(residual, x, weight)

and whatever read `total` reads `residual`, which holds the sum from there on. The residual stream
of a decoder thus stays in one tensor through all layers. Spared are residuals that are read later,
themselves or through a view, that the same product reads, and that may be part of something else:
a weight, a graph input, a view other than all of a tensor in another shape. Order matters from here
on, so all fusing comes before.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autodeploy.custom_ops.linear import add_linear, fused_linear
from autodeploy.custom_ops.moe import experts
from autodeploy.custom_ops.norm import add_rms_norm, rms_norm, rms_norm_add

from ..program import Fact, Program
from ..transform import Site, Transform, is_call, register_transform

aten = torch.ops.aten

# Always a tensor of its own: neither a view of an argument nor the argument itself. Anything else
# counts as a view of all its arguments.
_MAKES_NEW = (
    fused_linear.overload, rms_norm.overload, add_rms_norm.overload, rms_norm_add.overload,
    aten.add.Tensor, aten.mul.Tensor, aten.linear.default, aten.embedding.default,
    experts.overload, aten.layer_norm.default, aten.index_select.default, aten.index.Tensor,
)  # fmt: skip


@register_transform("add_in_place")
@dataclass(frozen=True)
class AddInPlace(Transform):
    """Lets products overwrite their residuals."""

    needs = frozenset({Fact.CANONICAL})
    breaks = frozenset({Fact.CANONICAL, Fact.FUNCTIONAL})

    def sites(self, program: Program) -> Iterable[Site]:
        places = {node: place for place, node in enumerate(program.graph.nodes)}
        for node in places:
            if is_call(node, fused_linear.overload) and _may_overwrite(node, places):
                yield Site((node,))

    def rewrite(self, program: Program, site: Site) -> None:
        (node,) = site.nodes
        given = fused_linear.bind(node.args, node.kwargs)
        arguments = [given[name] for name in add_linear.arguments]
        program.call(add_linear.overload, *arguments, before=node, like=node)
        node.replace_all_uses_with(given["residual"])
        program.graph.erase_node(node)


def _may_overwrite(node: fx.Node, places: dict[fx.Node, int]) -> bool:
    """Whether a fused linear has a residual of its own dtype that it is the last to read."""
    residual: Any = fused_linear.bind(node.args, node.kwargs)["residual"]
    whole = whole_of(residual)
    if whole is None or not is_new(whole):
        return False
    ours, theirs = node.meta["val"], residual.meta["val"]
    # Symbols compare by expression: never ask the shape environment, which would guard.
    alike = [str(n) for n in ours.shape] == [str(n) for n in theirs.shape]
    if not alike or ours.dtype is not theirs.dtype:
        return False
    read = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node)]
    views = {whole, *views_of(whole)} - {residual}
    return (
        read.count(residual) == 1
        and views.isdisjoint(read)
        and all(
            places[user] < places[node]
            for view in (residual, *views)
            for user in view.users
            if user is not node
        )
    )


def whole_of(node: Any) -> Any:
    """What a node is all of, in another shape maybe."""
    while is_call(node, aten.reshape.default):
        node = node.args[0]
    return node


def is_new(node: fx.Node) -> bool:
    """Whether a node's value is known to be in memory of its own, which it fills."""
    if is_call(node, operator.getitem):
        return is_call(node.args[0], *_MAKES_NEW)
    return is_call(node, *_MAKES_NEW)


def views_of(node: fx.Node) -> set[fx.Node]:
    """Nodes that may share memory with `node`, itself apart."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        further = [u for u in pending.pop().users if not is_call(u, *_MAKES_NEW)]
        pending += [user for user in further if user not in found]
        found.update(further)
    return found
