"""fuse_parallel_linears: linears that read the same tensor become one.

    q = linear(x, wq); k = linear(x, wk); v = linear(x, wv)
becomes
    q, k, v = split(linear(x, wq ++ wk ++ wv), [..])

The fused weight is a list of slices of checkpoint tensors, joined when it is loaded: it never
exists twice. Covers qkv and gate-up projections, and whatever else a model puts side by side.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from ..program import Fact, Program, Weight
from ..transform import Site, Transform, is_call, register_transform

aten = torch.ops.aten


@register_transform("fuse_parallel_linears")
@dataclass(frozen=True)
class FuseParallelLinears(Transform):
    """Joins linears over one input. `max_width`: widest output joined; 0 for no limit."""

    needs = frozenset({Fact.FUNCTIONAL, Fact.CANONICAL, Fact.LAZY_WEIGHTS})
    max_width: int = 0

    def sites(self, program: Program) -> Iterable[Site]:
        parallel: dict[tuple[object, ...], list[fx.Node]] = defaultdict(list)
        for node in program.graph.nodes:
            if is_call(node, aten.linear.default) and _is_plain(program, node):
                dtype = node.args[1].meta["val"].dtype
                parallel[(node.args[0], _bias(node) is not None, dtype)].append(node)
        for nodes in parallel.values():
            width = sum(int(n.meta["val"].shape[-1]) for n in nodes)
            if len(nodes) > 1 and (not self.max_width or width <= self.max_width):
                yield Site(tuple(nodes))

    def rewrite(self, program: Program, site: Site) -> None:
        first = site.nodes[0]
        weight = _joined(program, [n.args[1] for n in site.nodes], first)  # type: ignore[misc]
        biases = [bias for n in site.nodes if (bias := _bias(n)) is not None]
        arguments = [first.args[0], weight]
        if biases:
            arguments.append(_joined(program, biases, first))
        fused = program.call(aten.linear.default, *arguments, before=first, like=first)
        sizes = [int(n.meta["val"].shape[-1]) for n in site.nodes]
        parts = program.call(
            aten.split_with_sizes.default, fused, sizes, -1, before=first, like=first
        )
        taken = [
            program.call(operator.getitem, parts, index, before=first, like=node)
            for index, node in enumerate(site.nodes)
        ]
        for node, part in zip(site.nodes, taken, strict=True):
            node.replace_all_uses_with(part)
            program.graph.erase_node(node)


def _bias(node: fx.Node) -> fx.Node | None:
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return bias if isinstance(bias, fx.Node) else None


def _is_plain(program: Program, node: fx.Node) -> bool:
    """Weight and bias are read straight from the checkpoint, and by this linear alone."""
    operands = [node.args[1], _bias(node)]
    return all(
        isinstance(n, fx.Node)
        and n.op == "get_attr"
        and len(n.users) == 1
        and str(n.target) in program.weights
        for n in operands
        if n is not None
    )


def _joined(program: Program, nodes: list[fx.Node], before: fx.Node) -> fx.Node:
    weights = [program.weights[str(node.target)] for node in nodes]
    joined = Weight(
        tuple(piece for weight in weights for piece in weight.pieces),
        (sum(weight.shape[0] for weight in weights), *weights[0].shape[1:]),
        weights[0].dtype,
    )
    return program.add_weight(_joined_name([str(n.target) for n in nodes]), joined, before)


def _joined_name(names: list[str]) -> str:
    """`layers_0_q_proj_weight`, `layers_0_k_proj_weight` -> `layers_0_q_proj_and_k_proj_weight`."""
    parts = [name.split("_") for name in names]
    head = next((i for i, words in enumerate(zip(*parts, strict=False)) if len({*words}) > 1), 0)
    kind = parts[0][-1]
    middles = ["_".join(words[head:-1]) for words in parts]
    return "_".join([*parts[0][:head], "_and_".join(middles), kind])
