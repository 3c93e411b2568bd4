"""fuse_linear: a linear takes in the norm before it and the gate or residual sum after it.

    y = aten.linear(rms_norm(x, w), weight)
becomes
    y = fused_linear(x, weight, norm_weight=w, norm=True)

    gate, up = aten.split_with_sizes(aten.linear(x, weight), [F, F], -1)
    y = aten.mul(aten.silu(gate), up)
becomes
    y = fused_linear(x, weight, activation="silu", gated=True)

    y = aten.add(residual, aten.linear(x, weight))
becomes
    y = fused_linear(x, weight, residual=residual)

and any linear with nothing to take in becomes a bare `fused_linear`, which is faster at few tokens.
A norm is taken in if this linear alone reads it; rows that are chosen in between (the head's) are
chosen before the norm instead. In bfloat16 the residual is added before the product is rounded:
one rounding less than in the graph it replaces, never one more. A residual stream in float32 stays
one: sums are float32, and norms read them without the cast between.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autodeploy.custom_ops.linear import fused_linear
from autodeploy.custom_ops.norm import rms_norm

from ..gated_mlp import activation_of, match_gate
from ..program import Fact, Program
from ..transform import Site, Transform, is_call, register_transform

aten = torch.ops.aten


@register_transform("fuse_linear")
@dataclass(frozen=True)
class FuseLinear(Transform):
    """Makes every linear one op with its surroundings. `devices`: types of device to do it on."""

    needs = frozenset({Fact.CANONICAL})
    devices: tuple[str, ...] = ("cuda",)

    def sites(self, program: Program) -> Iterable[Site]:
        if program.contract.device.type not in self.devices:
            return
        taken: set[fx.Node] = set()
        for node in program.graph.nodes:
            if not _is_matrix_product(node):
                continue
            # A sum of two products goes with the first.
            ends = [end for end in _ends(node) if end not in taken]
            taken.update(ends)
            yield Site((node, *ends))

    def rewrite(self, program: Program, site: Site) -> None:
        linear, *ends = site.nodes
        last = ends[0] if ends else linear
        given: dict[str, Any] = dict(zip(("x", "weight", "bias"), linear.args, strict=False))
        given |= linear.kwargs
        given |= _end(linear, ends[0]) if ends else {}
        given |= _begin(program, linear)
        fused = program.call(
            fused_linear.overload, *(given.pop(name) for name in ("x", "weight")),
            before=last, like=linear, **given,
        )  # fmt: skip
        last.replace_all_uses_with(fused)
        program.graph.erase_node(last)


def _is_matrix_product(node: fx.Node) -> bool:
    """A linear whose weight has two dimensions; aten allows one."""
    if not is_call(node, aten.linear.default):
        return False
    weight = node.args[1]
    return isinstance(weight, fx.Node) and weight.meta["val"].dim() == 2


def _begin(program: Program, linear: fx.Node) -> dict[str, Any]:
    """Arguments for the norm before a linear; rows are chosen before it from here on."""
    dtype = linear.meta["val"].dtype
    norm: Any = linear.args[0]
    choice: Any = None
    while len(norm.users) == 1 and not is_call(norm, rms_norm.overload):
        if choice is None and _chooses_rows(norm):
            choice = norm
        elif not _rounds(norm, dtype):
            return {}
        norm = norm.args[0]
    if len(norm.users) != 1:
        return {}
    form = rms_norm.bind(norm.args, norm.kwargs)
    x = form.pop("x")
    scale = form["weight"]
    if scale is not None and scale.meta["val"].dtype is not dtype:
        # A weight in float32 makes a result in float32.
        return {}
    if _rounds(x, dtype):
        # The norm reads what is there: one rounding less.
        x = x.args[0]
    if x.meta["val"].dtype not in (dtype, torch.float32):
        return {}
    if choice is not None:
        x = program.call(choice.target, x, *choice.args[1:], before=linear, like=choice)
    return {
        "x": x,
        "norm": True,
        "norm_weight": form["weight"],
        "eps": form["eps"],
        "norm_offset": form["offset"],
        "cast_before_weight": form["cast_before_weight"],
    }


def _rounds(node: Any, dtype: torch.dtype) -> bool:
    """A cast of float32 to `dtype`, and nothing else."""
    if not is_call(node, aten._to_copy.default, aten.to.dtype):
        return False
    same = node.meta["val"].device == node.args[0].meta["val"].device
    was, made = node.args[0].meta["val"].dtype, node.meta["val"].dtype
    return same and was is torch.float32 and made is dtype


def _chooses_rows(node: Any) -> bool:
    """Whole rows [.., D] are gathered, none of them cut."""
    if is_call(node, aten.index_select.default):
        rank = node.args[0].meta["val"].dim()
        return node.args[1] % rank != rank - 1
    if is_call(node, aten.index.Tensor):
        # The last dimension has no index, and comes last.
        indices = node.args[1]
        rank = node.args[0].meta["val"].dim()
        places = [at for at, index in enumerate(indices) if index is not None]
        return (
            len(places) == 1 and places[0] < rank - 1 and indices[places[0]].meta["val"].dim() == 1
        )
    return False


def _ends(linear: fx.Node) -> list[fx.Node]:
    """The last node of what a linear can take in after it: one or none."""
    if len(linear.users) != 1:
        return []
    (user,) = linear.users
    if activation_of(user) is not None:
        return [user]
    if _residual(user, linear) is not None:
        return [user]
    # Gates: parts, their halves, one activated, the product.
    reach = [user]
    for _ in range(3):
        reach = [further for node in reach for further in node.users]
        for node in reach:
            if (match := match_gate(node)) is not None and match[0] is linear:
                return [node] if _is_all_of(linear, node) else []
    return []


def _is_all_of(linear: fx.Node, product: fx.Node) -> bool:
    """Whether `product`, which comes of a linear's output alone, is all that comes of it."""
    between: set[fx.Node] = set()
    pending = [product]
    while pending:
        found = {node for node in pending.pop().all_input_nodes if node is not linear} - between
        between |= found
        pending += found
    return all(user in between or user is product for node in between for user in node.users)


def _end(linear: fx.Node, last: fx.Node) -> dict[str, Any]:
    """Arguments for what comes after a linear, up to `last`."""
    name = activation_of(last)
    if name is not None:
        return {"activation": name}
    match = match_gate(last)
    if match is not None and match[0] is linear:
        return {"activation": match[1], "gated": True}
    return {"residual": _residual(last, linear)}


def _residual(total: fx.Node, product: fx.Node) -> fx.Node | None:
    """What is added to a product, unscaled: of its shape, and its dtype or float32; or None."""
    if not is_call(total, aten.add.Tensor) or total.kwargs or len(total.args) != 2:
        return None
    others = [node for node in total.args if node is not product]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    ours, theirs = product.meta["val"], others[0].meta.get("val")
    if not isinstance(theirs, torch.Tensor) or theirs.dtype not in (ours.dtype, torch.float32):
        return None
    # Symbols compare by expression: never ask the shape environment, which would guard.
    alike = [str(n) for n in theirs.shape] == [str(n) for n in ours.shape]
    return others[0] if alike else None
