"""fuse_gated_activation: the halves of one projection, activated and multiplied, are one op.

    gate, up = aten.split_with_sizes(x, [F, F], -1)
    y = aten.mul(aten.silu(gate), up)
becomes
    y = gated_activation(x, "silu")

After `fuse_parallel_linears`, which puts gate and up side by side, and after what takes gates into
the product that makes them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autodeploy.custom_ops.gate import gated_activation

from ..program import Fact, Program
from ..transform import Site, Transform, is_call, register_transform

aten = torch.ops.aten

_SPLITS = frozenset({aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default})
_ACTIVATIONS: dict[Any, str] = {
    aten.silu.default: "silu",
    aten.relu.default: "relu",
    aten.relu6.default: "relu6",
    aten.mish.default: "mish",
    aten.hardswish.default: "hardswish",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
}


@register_transform("fuse_gated_activation")
@dataclass(frozen=True)
class FuseGatedActivation(Transform):
    """Joins gates. `devices`: types of device on which there is a kernel for it."""

    needs = frozenset({Fact.CANONICAL})
    devices: tuple[str, ...] = ("cuda",)

    def sites(self, program: Program) -> Iterable[Site]:
        if program.contract.device.type not in self.devices:
            return
        for product in program.graph.nodes:
            if (match := match_gate(product)) is not None:
                yield Site((product, match[0]))

    def rewrite(self, program: Program, site: Site) -> None:
        product, source = site.nodes
        match = match_gate(product)
        assert match is not None
        fused = program.call(
            gated_activation.overload, source, match[1], before=product, like=product
        )
        product.replace_all_uses_with(fused)
        program.graph.erase_node(product)


def match_gate(product: fx.Node) -> tuple[fx.Node, str] | None:
    """The tensor [..., 2F] and the activation whose gate `product` is; None if it is none."""
    if not is_call(product, aten.mul.Tensor):
        return None
    for active, other in (product.args[:2], product.args[1::-1]):
        name = activation_of(active)
        if name is None or not isinstance(active, fx.Node) or len(active.users) != 1:
            continue
        gate = active.args[0]
        source, width = _half_of(gate, 0), _half_of(other, 1)
        if source is not None and source is width:
            return source, name
    return None


def activation_of(node: Any) -> str | None:
    """The name, in `moe.gates.ACTIVATIONS`, of the activation that a node calls."""
    if is_call(node, aten.gelu.default):
        approximate = node.kwargs.get("approximate", "none") if len(node.args) < 2 else node.args[1]
        return {"none": "gelu", "tanh": "gelu_pytorch_tanh"}.get(approximate)
    return _ACTIVATIONS.get(node.target) if isinstance(node, fx.Node) else None


def _half_of(node: Any, index: int) -> fx.Node | None:
    """The tensor whose first (0) or second (1) half along the last dimension a node is."""
    if not is_call(node, operator.getitem) or node.args[1] != index:
        return None
    parts = node.args[0]
    if not is_call(parts, *_SPLITS):
        return None
    source = parts.args[0]
    rank = source.meta["val"].dim()
    axis = parts.args[2] if len(parts.args) > 2 else parts.kwargs.get("dim", 0)
    widths = [str(part.shape[-1]) for part in parts.meta["val"]]
    alone = axis % rank == rank - 1 and len(widths) == 2 and widths[0] == widths[1]
    return source if alone else None
