"""gather_logits: rows whose logits nobody needs never reach the language-model head.

    logits = linear(hidden, head); out = index_select(squeeze(logits), 0, logit_index)
becomes
    out = squeeze(linear(index_select(hidden, 1, logit_index), head))

Models that take `logits_to_keep` are captured that way already and have no site.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from ..program import Fact, Program
from ..transform import Site, Transform, is_call, register_transform

aten = torch.ops.aten

ROWWISE = frozenset(
    {aten.squeeze.dim, aten.mul.Tensor, aten.div.Tensor, aten.tanh.default, aten._to_copy.default}
)
"""Ops that treat every row alike, so that picking rows before or after them is the same."""


@register_transform("gather_logits")
@dataclass(frozen=True)
class GatherLogits(Transform):
    """Moves the choice of rows from behind the head to before it."""

    needs = frozenset({Fact.FUNCTIONAL, Fact.CANONICAL})

    def sites(self, program: Program) -> Iterable[Site]:
        for node in program.graph.nodes:
            if is_call(node, aten.index_select.default) and _is_logit_index(node.args[2]):
                chain = _chain_to_linear(node)
                if chain is not None:
                    yield Site((node, *chain))

    def rewrite(self, program: Program, site: Site) -> None:
        gather, *chain = site.nodes
        head = chain[-1]
        hidden = head.args[0]
        picked = program.call(
            aten.index_select.default, hidden, 1, gather.args[2], before=head, like=head
        )
        head.replace_input_with(hidden, picked)  # type: ignore[arg-type]
        gather.replace_all_uses_with(chain[0])
        program.graph.erase_node(gather)
        for node in reversed(chain):
            program.infer(node)


def _is_logit_index(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "placeholder" and node.name == "logit_index"


def _chain_to_linear(gather: fx.Node) -> list[fx.Node] | None:
    """Row-wise nodes between the gather and the head, nearest first; None if there is another."""
    chain: list[fx.Node] = []
    node = gather.args[0]
    while isinstance(node, fx.Node) and len(node.users) == 1:
        chain.append(node)
        if is_call(node, aten.linear.default):
            return (
                chain
                if len(node.args) == 2 or node.args[2] is None or isinstance(node.args[2], fx.Node)
                else None
            )
        if not is_call(node, *ROWWISE) or any(isinstance(a, fx.Node) for a in node.args[1:]):
            return None
        node = node.args[0]
    return None
