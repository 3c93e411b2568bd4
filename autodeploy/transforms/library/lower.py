"""lower: every op node calls the best implementation that applies to its shapes and device.

    autodeploy.paged_attention(...)   ->   paged_attention.native_cpu(...)

Late on purpose: every earlier step sees one spelling per idea. The chosen function is called
directly, without the dispatcher, unless a compiler follows (`through_dispatcher`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from autodeploy.custom_ops.op import Choice, op_of

from ...errors import TransformError
from ..cost import VIEWS
from ..program import Fact, Program
from ..transform import Site, Transform, is_call, register_transform


@register_transform("lower")
@dataclass(frozen=True)
class Lower(Transform):
    """Chooses implementations.

    prefer: names taken first wherever they apply.
    through_dispatcher: call them as `torch.ops`, which a compiler needs.
    """

    needs = frozenset({Fact.CACHED})
    gives = frozenset({Fact.LOWERED})
    prefer: tuple[str, ...] = ()
    through_dispatcher: bool = False

    def sites(self, program: Program) -> Iterable[Site]:
        for node in program.graph.nodes:
            if node.op == "call_function" and op_of(node.target) is not None:
                yield Site((node,))

    def rewrite(self, program: Program, site: Site) -> None:
        node = site.nodes[0]
        op = op_of(node.target)
        if op is None:
            raise TransformError(f"{site.where} is no op node")
        bound = op.bind(node.args, node.kwargs)
        values = fx.node.map_arg(bound, lambda n: n.meta["val"])
        chosen = op.choose(Choice(program.contract.device, values), self.prefer)
        node.args, node.kwargs = tuple(bound.values()), {}
        node.meta["op"], node.meta["implementation"] = op.name, chosen.name
        if not chosen.capturable:
            program.options.setdefault("eager", set()).add(f"{op.name} ({chosen.name})")
        if op.mutates:
            node.meta["mutates"] = True
        node.target = op.dispatched(chosen) if self.through_dispatcher else chosen.function

    def finish(self, program: Program) -> None:
        eager = set(program.options.pop("eager", ()))
        eager |= {str(node.target) for node in program.graph.nodes if _waits(node)}
        calls = sum(map(_launches, program.graph.nodes))
        program.contract = dataclasses.replace(
            program.contract, eager=tuple(sorted(eager)), calls=calls
        )


def _waits(node: fx.Node) -> bool:
    """Whether the host must know what the device computed: a number, or how many there are."""
    target, value = node.target, node.meta.get("val")
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if torch.Tag.data_dependent_output in target.tags or target is torch.ops.aten.item.default:
        return True
    made = value.shape if isinstance(value, torch.Tensor) else ()
    taken = (n.meta.get("val") for n in node.all_input_nodes)
    known = {str(size) for t in taken if isinstance(t, torch.Tensor) for size in t.shape}
    return torch.Tag.dynamic_output_shape in target.tags and any(
        free_unbacked_symbols(size) and str(size) not in known for size in made
    )


def _launches(node: fx.Node) -> bool:
    """Whether a node is more than another view of what is there, or a size."""
    return (
        node.op == "call_function"
        and not is_call(node, *VIEWS)
        and isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))
    )
