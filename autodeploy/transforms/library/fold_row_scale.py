"""fold_row_scale: a number per row is multiplied before a product, not after it.

    y = aten.mul(sigmoid(s), aten.linear(aten.mul(a, b), weight))
becomes
    y = aten.linear(aten.mul(aten.mul(a, b), sigmoid(s)), weight)

Shared experts have such a gate. Before the product it joins a pass over the rows that is there
anyway, and the product is free to take in what follows: the sum with the routed experts. Left alone
are products of anything but products of numbers, where it would be one pass for another.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..program import Fact, Program
from ..transform import Site, Transform, is_call, register_transform
from ..walk import operands

aten = torch.ops.aten


@register_transform("fold_row_scale")
@dataclass(frozen=True)
class FoldRowScale(Transform):
    """Moves scales of rows. `devices`: types of device to do it on."""

    needs = frozenset({Fact.CANONICAL})
    devices: tuple[str, ...] = ("cuda",)

    def sites(self, program: Program) -> Iterable[Site]:
        if program.contract.device.type not in self.devices:
            return
        for node in program.graph.nodes:
            match = _match(node)
            if match is not None:
                yield Site((node, *match))

    def rewrite(self, program: Program, site: Site) -> None:
        product, scale, linear = site.nodes
        x, weight = linear.args[:2]
        scaled = program.call(aten.mul.Tensor, x, scale, before=product, like=product)
        moved = program.call(aten.linear.default, scaled, weight, before=product, like=linear)
        product.replace_all_uses_with(moved)


def _match(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The scale [.., 1] and the linear without bias whose product, and all of it, `node` is."""
    for scale, linear in operands(node, aten.mul.Tensor):
        if not is_call(linear, aten.linear.default) or len(linear.users) != 1:
            continue
        x: Any = linear.args[0]
        bias = linear.args[2] if len(linear.args) > 2 else linear.kwargs.get("bias")
        values = [n.meta["val"] for n in (scale, x, linear, node)]
        # Symbols compare by expression: never ask the shape environment, which would guard.
        rows = [[str(size) for size in value.shape[:-1]] for value in values]
        if (
            bias is None
            and is_call(x, aten.mul.Tensor)
            and len(x.users) == 1
            and scale.op == "call_function"
            and str(values[0].shape[-1]) == "1"
            and len({value.dtype for value in values}) == 1
            and all(shape == rows[0] for shape in rows)
        ):
            return scale, linear
    return None
