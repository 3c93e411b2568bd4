"""fuse_rotary_attention: head norms, rotation and the writing of pages become one launch.

    q, k = rope(rms_norm(heads(q)), rms_norm(heads(k)), cos, sin)
    y = paged_attention(q, k, v, k_cache, v_cache, ..)
becomes
    y = rotary_paged_attention(heads(q), heads(k), v, k_cache, v_cache, .., cos, sin, ..)

The norms may be missing. Models put heads before tokens or after them at different places, so
views between the parts are followed by what they do to dimensions, not by their names. The fused
op reads [T, H, D] views of the projection; what was between has no other reader, or the site is
left alone. So are norms over all heads at once, and keys that several layers share.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autodeploy.custom_ops.attention import paged_attention, rotary_paged_attention
from autodeploy.custom_ops.norm import rms_norm
from autodeploy.custom_ops.rope import rope

from ...errors import TransformError
from ..axis_order import Order, in_order, through_views
from ..program import Fact, Program
from ..transform import Site, Transform, is_call, register_transform


@register_transform("fuse_rotary_attention")
@dataclass(frozen=True)
class FuseRotaryAttention(Transform):
    """Joins norms and rotation to attention. `devices`: types of device with a kernel for it."""

    needs = frozenset({Fact.CACHED})
    devices: tuple[str, ...] = ("cuda",)

    def sites(self, program: Program) -> Iterable[Site]:
        if program.contract.device.type not in self.devices:
            return
        for node in program.graph.nodes:
            if is_call(node, paged_attention.overload) and find_rotary(node) is not None:
                yield Site((node,))

    def rewrite(self, program: Program, site: Site) -> None:
        (node,) = site.nodes
        found = find_rotary(node)
        if found is None:
            raise TransformError(f"{site.where} does not rotate its queries and keys")
        given = paged_attention.bind(node.args, node.kwargs)
        given |= {
            "q": in_order(program, found.q.heads, node),
            "k": in_order(program, found.k.heads, node),
            "v": in_order(program, through_views(Order.of(given["v"])), node),
            **found.options,
        }
        fused = program.call(
            rotary_paged_attention.overload,
            *(given[name] for name in rotary_paged_attention.arguments), before=node, like=node,
        )  # fmt: skip
        node.replace_all_uses_with(fused)
        program.graph.erase_node(node)


@dataclass(frozen=True)
class Heads:
    """Queries or keys of one layer before they are normalised."""

    heads: Order
    weight: fx.Node | None = None
    eps: float | None = None
    form: tuple[Any, ...] = ()
    """offset and cast_before_weight of their norm."""


@dataclass(frozen=True)
class Rotary:
    """What one attention node reads: heads, and how they come to be what it attends to."""

    q: Heads
    k: Heads
    table: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        offset, cast_before_weight = self.q.form or (0.0, True)
        return self.table | {
            "q_norm": self.q.weight, "k_norm": self.k.weight, "q_eps": self.q.eps,
            "k_eps": self.k.eps, "norm_offset": offset, "cast_before_weight": cast_before_weight,
        }  # fmt: skip


def find_rotary(node: fx.Node) -> Rotary | None:
    """The rotation, and the norms if any, behind queries and keys of a `paged_attention` node."""
    given = paged_attention.bind(node.args, node.kwargs)
    q, k = (_taken(given[name], index) for index, name in enumerate(("q", "k")))
    if q is None or k is None or q.node.args[0] is not k.node.args[0]:
        return None
    turn: Any = q.node.args[0]
    turned = rope.bind(turn.args, turn.kwargs)
    if len(turn.users) != 2 or not _one_dtype(turned, given):
        return None
    heads = [
        _heads(Order(turned[name], order.axes), turn)
        for name, order in (("q", q), ("k", k))
    ]  # fmt: skip
    first, second = heads
    if (first.eps is None) != (second.eps is None) or first.form != second.form:
        return None
    return Rotary(
        first, second, {name: turned[name] for name in ("cos", "sin", "interleaved")}
    )  # fmt: skip


def _taken(read: fx.Node, index: int) -> Order | None:
    """Result `index` of a rope node that nothing reads but views on the way to `read`."""
    order = through_views(Order.of(read), alone=True)
    node = order.node
    if not is_call(node, operator.getitem) or node.args[1] != index or len(node.users) != 1:
        return None
    turn = node.args[0]
    if not is_call(turn, rope.overload):
        return None
    # The op rotates the last dimension, by the token in the one that its option says.
    dimension = 3 - rope.bind(turn.args, turn.kwargs)["unsqueeze_dim"]  # type: ignore[union-attr]
    expected = ("t", "h", "d") if dimension == 1 else ("h", "t", "d")
    return order if order.is_laid_out(expected) else None


def _one_dtype(turned: dict[str, Any], given: dict[str, Any]) -> bool:
    """Of heads, caches and table; one in float32 that leaves heads in theirs is as good."""
    tensors = [turned[name] for name in ("q", "k")]
    tensors += [given[name] for name in ("v", "k_cache", "v_cache")]
    rows = (turned["cos"], turned["sin"])
    wide = turned["cast"] and all(t.meta["val"].dtype is torch.float32 for t in rows)
    tensors += () if wide else rows
    return len({t.meta["val"].dtype for t in tensors}) == 1 and all(
        t.meta["val"].dim() == 3 and t.meta["val"].shape[0] == 1 for t in rows
    )


def _heads(turned: Order, turn: fx.Node) -> Heads:
    """What is turned, before a norm over single heads if there is one that only this reads."""
    normed = through_views(turned, alone=True)
    node = normed.node
    if is_call(node, rms_norm.overload) and len(node.users) == 1 and normed.axes[-1] == "d":
        norm = rms_norm.bind(node.args, node.kwargs)
        x, weight = norm["x"], norm["weight"]
        same = weight is None or weight.meta["val"].dtype is x.meta["val"].dtype
        if same and x.meta["val"].dtype is node.meta["val"].dtype:
            heads = through_views(Order(x, normed.axes))
            form = (norm["offset"], norm["cast_before_weight"])
            return Heads(heads, weight, norm["eps"], form)
    return Heads(through_views(turned))
