"""fuse_norm: an RMS norm that is written out in float32 becomes one op.

    h = x * rsqrt(mean(x ** 2) + eps)
    y = weight * h
becomes
    y = rms_norm(x, weight, eps)

Norms that are modules of their own are found while capturing. This finds those that are part of
another module, such as one that applies a gate first, which is by now part of the op in front.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from autodeploy.custom_ops.norm import rms_norm

from ..gated_norm import find_normed
from ..program import Fact, Program
from ..transform import Site, Transform, is_call, register_transform
from ..walk import operands

aten = torch.ops.aten


@register_transform("fuse_norm")
@dataclass(frozen=True)
class FuseNorm(Transform):
    """Makes norms one op. `devices`: types of device on which there is a kernel for it."""

    needs = frozenset({Fact.CANONICAL})
    devices: tuple[str, ...] = ("cuda",)

    def sites(self, program: Program) -> Iterable[Site]:
        if program.contract.device.type not in self.devices:
            return
        for node in program.graph.nodes:
            if is_call(node, aten.pow.Tensor_Scalar) and _scaled(node.args[0]) is not None:
                yield Site((node.args[0],))

    def rewrite(self, program: Program, site: Site) -> None:
        (rows,) = site.nodes
        found = _scaled(rows)
        assert found is not None
        last, weight, eps = found
        fused = program.call(rms_norm.overload, rows, weight, eps, before=last, like=last)
        last.replace_all_uses_with(fused)
        program.graph.erase_node(last)


def _scaled(rows: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """The product of normed rows [.., D] with a weight [D], that weight, and eps."""
    if rows.meta["val"].dtype is not torch.float32:
        return None
    normed, eps = find_normed(rows)
    if normed is None or len(normed.users) != 1:
        return None
    (last,) = normed.users
    for first, second in operands(last, aten.mul.Tensor):
        whole = second.op == "get_attr" and second.meta["val"].shape == rows.meta["val"].shape[-1:]
        if first is normed and whole:
            return last, second, eps
    return None
