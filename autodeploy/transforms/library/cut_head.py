"""cut_head: the program returns what the language-model head reads, and the head is gone.

    out = squeeze(linear(hidden, head) * scale)            [N, vocab]
becomes
    out = squeeze(hidden)                                  [N, hidden]

The one transform after which there are no logits any more: `contract.hidden` says so. It is no
part of a recipe; `task='embed'` puts it in, behind `cache`, where what was captured has been
checked against the model's logits and no linear has been fused yet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from ..program import Fact, Program
from ..transform import Site, Transform, is_call, register_transform
from .gather_logits import ROWWISE

aten = torch.ops.aten


@register_transform("cut_head")
@dataclass(frozen=True)
class CutHead(Transform):
    """Returns hidden states instead of logits."""

    needs = frozenset({Fact.CANONICAL})
    exact = False

    def sites(self, program: Program) -> Iterable[Site]:
        head = _head_of(program.graph.output_node())
        if head is not None:
            yield Site((head,))

    def rewrite(self, program: Program, site: Site) -> None:
        (head,) = site.nodes
        hidden = head.args[0]
        assert isinstance(hidden, fx.Node)
        if hidden.meta["val"].dim() == 3:
            hidden = program.call(aten.squeeze.dim, hidden, 0, before=head, like=head)
        output = program.graph.output_node()
        (logits,) = output.all_input_nodes
        output.replace_input_with(logits, hidden)
        width = int(hidden.meta["val"].shape[-1])
        program.contract = dataclasses.replace(program.contract, hidden=width)


def _head_of(output: fx.Node) -> fx.Node | None:
    """The linear that all logits come from; None if something else makes them."""
    if len(output.all_input_nodes) != 1:
        return None
    (node,) = output.all_input_nodes
    while is_call(node, *ROWWISE):
        if len(node.all_input_nodes) != 1:
            return None
        (node,) = node.all_input_nodes
    return node if is_call(node, aten.linear.default) else None
