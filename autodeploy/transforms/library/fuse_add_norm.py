"""fuse_add_norm: a residual sum next to an RMS norm becomes one pass over the rows.

    h = aten.add(x, residual); y = rms_norm(h, w)
becomes
    y, h = add_rms_norm(x, residual, w)

    y = aten.add(residual, rms_norm(x, w))
becomes
    y = rms_norm_add(x, w, residual)

What is left for it: norms that several layers read, and layers that are normed last. A norm or a
sum with a single linear next to it is better off inside that linear, so this comes after.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from autodeploy.custom_ops.norm import add_rms_norm, rms_norm, rms_norm_add

from ..program import Fact, Program
from ..transform import Site, Transform, is_call, register_transform

aten = torch.ops.aten


@register_transform("fuse_add_norm")
@dataclass(frozen=True)
class FuseAddNorm(Transform):
    """Joins sums and norms. `devices`: types of device on which there is a kernel for it."""

    needs = frozenset({Fact.CANONICAL})
    devices: tuple[str, ...] = ("cuda",)

    def sites(self, program: Program) -> Iterable[Site]:
        if program.contract.device.type not in self.devices:
            return
        taken: set[fx.Node] = set()
        for total in program.graph.nodes:
            if not _is_plain_sum(total):
                continue
            norms = [*_norms_after(total), *_norms_before(total)]
            # A norm between two sums goes with the first.
            norm = next((norm for norm in norms if norm not in taken), None)
            if norm is not None:
                taken.add(norm)
                yield Site((total, norm))

    def rewrite(self, program: Program, site: Site) -> None:
        total, norm = site.nodes
        arguments = rms_norm.bind(norm.args, norm.kwargs)
        x, weight = arguments.pop("x"), arguments.pop("weight")
        form = tuple(arguments.values())
        if isinstance(weight, fx.Node) and total < weight:
            total.prepend(weight)
        if x is total:
            both = program.call(
                add_rms_norm.overload, *total.args[:2], weight, *form, before=total, like=norm
            )
            normed, summed = (
                program.call(operator.getitem, both, index, before=total, like=node)
                for index, node in enumerate((norm, total))
            )
            norm.replace_all_uses_with(normed)
            program.graph.erase_node(norm)
        else:
            (residual,) = (operand for operand in total.args[:2] if operand is not norm)
            summed = program.call(
                rms_norm_add.overload, x, weight, residual, *form, before=total, like=norm
            )
        total.replace_all_uses_with(summed)
        program.graph.erase_node(total)


def _is_plain_sum(node: fx.Node) -> bool:
    """Two tensors of one shape and dtype are added, unscaled."""
    if not is_call(node, aten.add.Tensor) or node.kwargs:
        return False
    a, b = node.args[:2]
    if len(node.args) > 2 or not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a is b:
        return False
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor) or x.dtype is not y.dtype:
        return False
    # Symbols compare by expression: never ask the shape environment, which would guard.
    return x.dtype.is_floating_point and [str(n) for n in x.shape] == [str(n) for n in y.shape]


def _norms_after(total: fx.Node) -> list[fx.Node]:
    return [n for n in total.users if _is_norm(n) and n.args[0] is total]


def _norms_before(total: fx.Node) -> list[fx.Node]:
    operands = [n for n in total.args[:2] if isinstance(n, fx.Node)]
    return [n for n in operands if _is_norm(n) and len(n.users) == 1]


def _is_norm(node: fx.Node) -> bool:
    """An RMS norm whose weight, if any, is of the model: it can be read anywhere."""
    if not is_call(node, rms_norm.overload):
        return False
    weight = rms_norm.bind(node.args, node.kwargs)["weight"]
    return weight is None or (isinstance(weight, fx.Node) and weight.op == "get_attr")
