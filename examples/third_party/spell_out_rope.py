"""A transform that lives outside autodeploy: it replaces every rope node by plain torch ops.

Slower, and exact: `recipe.yaml` beside this file puts it into the default recipe, and deploying
with `verify=True` shows that the logits stay the same.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from autodeploy.custom_ops.rope import rope
from autodeploy.transforms.program import Fact, Program
from autodeploy.transforms.transform import Site, Transform, is_call, register_transform

aten = torch.ops.aten


@register_transform("spell_out_rope")
@dataclass(frozen=True)
class SpellOutRope(Transform):
    """rope(q, k, cos, sin) -> x * cos + rotate_half(x) * sin, for q and for k."""

    needs = frozenset({Fact.FUNCTIONAL, Fact.CANONICAL})

    def sites(self, program: Program) -> Iterable[Site]:
        for node in program.graph.nodes:
            # Partial and interleaved forms are left as they are.
            if is_call(node, rope.overload):
                width, table = (
                    node.args[0].meta["val"].shape[-1],
                    node.args[2].meta["val"].shape[-1],
                )
                if width == table and rope.bind(node.args, node.kwargs)["interleaved"] is False:
                    yield Site((node,))

    def rewrite(self, program: Program, site: Site) -> None:
        (node,) = site.nodes

        def call(target: Any, *args: Any) -> Any:
            return program.call(target, *args, before=node, like=node)

        cos, sin = (call(aten.unsqueeze.default, table, 1) for table in node.args[2:4])
        for index, x in enumerate(node.args[:2]):
            half = x.meta["val"].shape[-1] // 2
            low = call(aten.slice.Tensor, x, -1, 0, half)
            high = call(aten.slice.Tensor, x, -1, half, 2 * half)
            turned = call(aten.cat.default, [call(aten.neg.default, high), low], -1)
            rotated = call(
                aten.add.Tensor, call(aten.mul.Tensor, x, cos), call(aten.mul.Tensor, turned, sin)
            )
            for taken in list(node.users):
                if taken.args[1] == index:
                    taken.replace_all_uses_with(rotated)
