"""fuse_gated_activation: the halves of one projection, activated and multiplied, are one op.

    gate, up = aten.split_with_sizes(x, [F, F], -1)
    y = aten.mul(aten.silu(gate), up)
becomes
    y = gated_activation(x, "silu")

After `fuse_parallel_linears`, which puts gate and up side by side, and after what takes gates into
the product that makes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from autodeploy.custom_ops.gate import gated_activation

from ..gated_mlp import match_gate
from ..program import Fact, Program
from ..transform import Site, Transform, register_transform


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
