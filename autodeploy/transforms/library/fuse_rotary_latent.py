"""fuse_rotary_latent: what stands around attention to latents joins it in one op.

    c = rms_norm(c); q_rope, k_rope = rope(q_rope, k_rope, cos, sin)
    y = cached_latent_attention(cat(heads_linear(q, W_uk), q_rope), cat(c, k_rope), cache, ..)
    y = heads_linear(y, W_uv)
becomes
    y = rotary_latent_attention(q, q_rope, c, k_rope, cache, .., W_uk, W_uv, .., cos, sin, .., w)

Norm and rotation may be missing. Of what was turned, queries and keys may be put in another order
if it is the same one: only their products count. In the cache the numbers then lie as they were
turned.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from autodeploy.custom_ops.attention import cached_latent_attention, rotary_latent_attention
from autodeploy.custom_ops.linear import heads_linear
from autodeploy.custom_ops.norm import rms_norm
from autodeploy.custom_ops.rope import rope

from ...errors import TransformError
from ..axis_order import Axes, Order, in_order, through_views
from ..columns import Columns
from ..program import Fact, Program
from ..transform import Site, Transform, is_call, register_transform

aten = torch.ops.aten


@register_transform("fuse_rotary_latent")
@dataclass(frozen=True)
class FuseRotaryLatent(Transform):
    """Joins norm, rotation and products to it. `devices`: types of device with a kernel for it."""

    needs = frozenset({Fact.CACHED})
    devices: tuple[str, ...] = ("cuda",)

    def sites(self, program: Program) -> Iterable[Site]:
        if program.contract.device.type not in self.devices:
            return
        for node in program.graph.nodes:
            if is_call(node, cached_latent_attention.overload):
                found = find_latent_heads(program, node)
                if found is not None:
                    yield Site((node, found.end))

    def rewrite(self, program: Program, site: Site) -> None:
        node, end = site.nodes
        found = find_latent_heads(program, node)
        if found is None:
            raise TransformError(f"{site.where} is no attention to latents between two products")
        given = cached_latent_attention.bind(node.args, node.kwargs) | found.options
        given |= {name: in_order(program, order, node) for name, order in found.rows.items()}
        # Before the node, whose cache no other reads in between; weights are known from the start.
        fused = program.call(
            rotary_latent_attention.overload,
            *(
                given.get(argument.name, argument.default_value)
                for argument in rotary_latent_attention.overload._schema.arguments
            ),
            before=end, like=end,
        )  # fmt: skip
        end.replace_all_uses_with(fused)
        program.graph.erase_node(end)
        program.graph.erase_node(node)


@dataclass(frozen=True)
class LatentHeads:
    """What one attention to latents reads, from before norm and rotation, and the product after."""

    end: fx.Node
    rows: dict[str, Order]
    """q, q_rest, latent and rest"""
    options: dict[str, Any] = field(default_factory=dict)


def find_latent_heads(program: Program, node: fx.Node) -> LatentHeads | None:
    """What is around a `cached_latent_attention` node, if that is what the op takes."""
    given = cached_latent_attention.bind(node.args, node.kwargs)
    end = next(iter(node.users)) if len(node.users) == 1 else None
    query, row = _beside(given["q"]), _beside(given["kv"])
    if end is None or not is_call(end, heads_linear.overload) or end.args[0] is not node:
        return None
    if query is None or row is None or not is_call(query[0], heads_linear.overload):
        return None
    asked: Any = query[0]
    q, key_weight = asked.args
    rank = row[0].meta["val"].shape[2]
    if given["value_width"] != rank or row[0].meta["val"].shape[1] != 1:
        return None
    latent, norm = _normed(program, Order.of(row[0]))
    q_rest, rest, table = _turned(program, query[1], row[1])
    rows = {"q": Order.of(q), "q_rest": q_rest, "latent": latent, "rest": rest}
    if len({order.node.meta["val"].dtype for order in rows.values()}) != 1:
        return None
    weights = {"key_weight": key_weight, "value_weight": end.args[1]}
    return LatentHeads(end, rows, weights | norm | table)


def _beside(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors [T, H, ..] that a tensor of rows is put together from."""
    parts: Any = node.args[0] if is_call(node, aten.cat.default) else ()
    return (parts[0], parts[1]) if len(parts) == 2 and node.args[1] in (-1, 2) else None


def _normed(program: Program, latent: Order) -> tuple[Order, dict[str, Any]]:
    """Latents before a norm over each of them, and its arguments; themselves if there is none."""
    order = through_views(latent)
    node = order.node
    if not is_call(node, rms_norm.overload) or order.axes[-1] != "d":
        return order, {}
    form = rms_norm.bind(node.args, node.kwargs)
    x, weight = form["x"], form["weight"]
    dtypes = {n.meta["val"].dtype for n in (x, node, weight) if n is not None}
    if len(dtypes) != 1:
        return order, {}
    return through_views(Order(x, order.axes)), {
        "norm": weight, "eps": form["eps"], "norm_offset": form["offset"],
        "cast_before_weight": form["cast_before_weight"],
    }  # fmt: skip


def _turned(
    program: Program, q_rest: fx.Node, rest: fx.Node
) -> tuple[Order, Order, dict[str, Any]]:
    """Queries and keys before their rotation, and its arguments; themselves if there is none."""
    columns = Columns(program)
    q, k = (_source(columns, node, index) for index, node in enumerate((q_rest, rest)))
    none: dict[str, Any] = {}
    plain = through_views(Order.of(q_rest)), through_views(Order.of(rest)), none
    if q is None or k is None or q[0] is not k[0] or not torch.equal(q[1], k[1]):
        return plain
    turned = rope.bind(q[0].args, q[0].kwargs)
    rows = [turned[name] for name in ("cos", "sin")]
    kept = [turned["q"].meta["val"].dtype is q_rest.meta["val"].dtype]
    kept += [turned["k"].meta["val"].dtype is rest.meta["val"].dtype]
    width = rest.meta["val"].shape[2]
    whole = all(
        r.meta["val"].dim() == 3 and r.meta["val"].shape[0] == 1 and r.meta["val"].shape[2] == width
        for r in rows
    )
    if not all(kept) or not whole:
        return plain
    axes: Axes = (None, "h", "t", "d") if turned["unsqueeze_dim"] == 1 else (None, "t", "h", "d")
    queries, keys = (through_views(Order(turned[name], axes)) for name in ("q", "k"))
    return queries, keys, {name: turned[name] for name in ("cos", "sin", "interleaved")}


def _source(columns: Columns, node: fx.Node, index: int) -> tuple[fx.Node, torch.Tensor] | None:
    """The rope node whose result `index` is all that `node` [T, H, S] holds, and in which order.

    The order, [S], is that of every head.
    """
    table = columns.of(node)
    held = None if table is None else columns.source(table)
    if held is None:
        return None
    result, places = held
    if not is_call(result, operator.getitem) or result.args[1] != index:
        return None
    turn = result.args[0]
    heads, width = places.shape
    order = places - width * torch.arange(heads)[:, None]
    whole = torch.equal(order[0].sort().values, torch.arange(width))
    if not is_call(turn, rope.overload) or not whole or bool((order != order[:1]).any()):
        return None
    return turn, order[0]  # type: ignore[return-value]
