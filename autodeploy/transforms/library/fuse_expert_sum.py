"""fuse_expert_sum: experts add what is added to their result.

    y = aten.add(residual, reshape(experts(x, ...), shape))
becomes
    y = reshape(experts(x, ..., residual=reshape(residual, [-1, H])), shape)

and with a shared expert between the two,
    y = aten.add(residual, fused_linear(z, weight, residual=reshape(experts(x, ...), shape)))
becomes
    y = fused_linear(z, weight, residual=reshape(experts(x, ..., residual=...), shape))

wherever reshapes stand.

The sum over a token's choices is in float32 there, and is rounded once with the residual in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autodeploy.custom_ops.linear import fused_linear
from autodeploy.custom_ops.moe import experts

from ..program import Fact, Program
from ..transform import Site, Transform, is_call, register_transform

aten = torch.ops.aten


@register_transform("fuse_expert_sum")
@dataclass(frozen=True)
class FuseExpertSum(Transform):
    """Gives experts their residual. `devices`: types of device on which there is a kernel."""

    needs = frozenset({Fact.CANONICAL})
    devices: tuple[str, ...] = ("cuda",)

    def sites(self, program: Program) -> Iterable[Site]:
        if program.contract.device.type not in self.devices:
            return
        taken: set[fx.Node] = set()
        for node in program.graph.nodes:
            match = _match(node)
            if match is not None and match[0] not in taken:
                taken.add(match[0])
                yield Site((node,))

    def rewrite(self, program: Program, site: Site) -> None:
        (total,) = site.nodes
        match = _match(total)
        assert match is not None
        old, part, residual = match
        given = experts.bind(old.args, old.kwargs)
        width = old.meta["val"].shape[-1]
        # Nothing but the sum reads it: it may wait for the residual.
        place = old if residual < old else total
        rows = residual
        if residual.meta["val"].dim() != 2:
            rows = program.call(
                aten.reshape.default, residual, [-1, width], before=place, like=total
            )
        values = [v for name, v in given.items() if name != "residual"]
        new = program.call(experts.overload, *values, rows, before=place, like=old)
        if part is old:
            total.replace_all_uses_with(new)
        elif place is old:
            old.replace_all_uses_with(new)
            total.replace_all_uses_with(part)
        else:
            shaped = program.call(
                aten.reshape.default, new, *part.args[1:], before=place, like=part
            )
            total.replace_all_uses_with(shaped)
        program.graph.erase_node(total)


def _match(total: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The experts, the summand that comes of them alone, and the other summand."""
    if not is_call(total, aten.add.Tensor) or total.kwargs or len(total.args) != 2:
        return None
    for part, residual in (total.args, total.args[::-1]):
        if not isinstance(part, fx.Node) or not isinstance(residual, fx.Node):
            return None
        old = _experts_in(part)
        if old is not None and residual is not part and _alike(part, residual, old):
            # The sum with a shared expert comes after experts: the residual has to come before.
            if _product_in(part) is not None and not residual < old:
                continue
            return old, part, residual
    return None


def _experts_in(part: fx.Node) -> fx.Node | None:
    """The experts that `part` is a view of, or a linear's sum with a view of."""
    node: Any = part
    product = _product_in(part)
    if product is not None:
        alone = _only(part) and _only(product)
        node = alone and fused_linear.bind(product.args, product.kwargs)["residual"]
    if isinstance(node, fx.Node) and is_call(node, aten.reshape.default):
        node = _only(node) and node.args[0]
    if not isinstance(node, fx.Node) or not is_call(node, experts.overload) or not _only(node):
        return None
    return node if experts.bind(node.args, node.kwargs)["residual"] is None else None


def _product_in(part: Any) -> fx.Node | None:
    """The product that `part` is, or is a view of."""
    product = part.args[0] if is_call(part, aten.reshape.default) else part
    return product if is_call(product, fused_linear.overload) else None


def _only(node: fx.Node) -> bool:
    return len(node.users) == 1


def _alike(part: fx.Node, residual: fx.Node, old: fx.Node) -> bool:
    """Both summands are rows [.., H] of one shape and dtype, and so are the experts'."""
    ours, theirs, rows = (node.meta["val"] for node in (part, residual, old))
    if not isinstance(theirs, torch.Tensor):
        return False
    # Symbols compare by expression: never ask the shape environment, which would guard.
    return (
        ours.dtype is theirs.dtype is rows.dtype
        and [str(n) for n in ours.shape] == [str(n) for n in theirs.shape]
        and str(ours.shape[-1]) == str(rows.shape[-1])
    )
