"""fuse_router_linear: a router takes in its product, and the norm in front of both.

    y = reshape(rms_norm(x, w), [-1, H])
    index, weights = route(fused_linear(y, weight, bias), k, ...)
becomes
    index, weights, y = routed(reshape(x, [-1, H]), weight, k, ..., norm_weight=w, norm=True)

The norm may be missing, and the product may be of both cast to float32. Experts, and whatever else
reads normed rows, read them from the new op. In bfloat16 alone: that is what its kernels are for.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autodeploy.custom_ops.linear import fused_linear
from autodeploy.custom_ops.moe import route, routed
from autodeploy.custom_ops.norm import rms_norm

from ..program import Fact, Program
from ..transform import Site, Transform, is_call, register_transform

aten = torch.ops.aten
_NARROW = (torch.bfloat16, torch.float16)
# What the kernels hold; a larger router is better off as it is.
_MOST_EXPERTS, _MOST_CHOICES, _WIDEST = 512, 32, 16384


@register_transform("fuse_router_linear")
@dataclass(frozen=True)
class FuseRouterLinear(Transform):
    """Joins norm, product and choice. `devices`: types of device on which there is a kernel."""

    needs = frozenset({Fact.CANONICAL})
    devices: tuple[str, ...] = ("cuda",)

    def sites(self, program: Program) -> Iterable[Site]:
        if program.contract.device.type not in self.devices:
            return
        for node in program.graph.nodes:
            if is_call(node, route.overload) and _product(node) is not None:
                yield Site((node,))

    def rewrite(self, program: Program, site: Site) -> None:
        (old,) = site.nodes
        given = _product(old)
        assert given is not None
        rows = x = given.pop("x")
        norm = _norm(x)
        place = old
        if norm is not None:
            form = rms_norm.bind(norm.args, norm.kwargs)
            place = norm
            rows = form["x"]
            if rows.meta["val"].dim() != 2:
                width = rows.meta["val"].shape[-1]
                rows = program.call(
                    aten.reshape.default, rows, [-1, width], before=place, like=norm
                )
            given |= {
                "norm": True, "norm_weight": form["weight"], "eps": form["eps"],
                "norm_offset": form["offset"], "cast_before_weight": form["cast_before_weight"],
            }  # fmt: skip
            for weight in (given["weight"], given["bias"], given["norm_weight"]):
                if weight is not None and place < weight:
                    place.prepend(weight)
        chosen = program.call(
            routed.overload, rows, given.pop("weight"), *old.args[1:], before=place, like=old,
            **given,
        )  # fmt: skip
        for user in list(old.users):
            part = program.call(operator.getitem, chosen, user.args[1], before=place, like=user)
            user.replace_all_uses_with(part)
        if norm is not None:
            normed = program.call(operator.getitem, chosen, 2, before=place, like=norm)
            if x is not norm:
                x.replace_all_uses_with(normed)
            shape = norm.meta["val"].shape
            if len(shape) != 2:
                sizes = [1, -1, shape[-1]]
                normed = program.call(aten.reshape.default, normed, sizes, before=place, like=norm)
            norm.replace_all_uses_with(normed)


def _product(node: fx.Node) -> dict[str, Any] | None:
    """x, weight, bias and width of the linear that makes a router's logits; None for another."""
    linear = node.args[0]
    if not isinstance(linear, fx.Node) or not is_call(linear, fused_linear.overload):
        return None
    given = fused_linear.bind(linear.args, linear.kwargs)
    plain = not (given["norm"] or given["gated"] or given["activation"])
    if not plain or given["residual"] is not None or len(linear.users) != 1:
        return None
    operands = [given[name] for name in ("x", "weight", "bias")]
    wide = operands[0].meta["val"].dtype is torch.float32
    if wide:
        operands = [_narrow(node) for node in operands]
    x, weight, bias = operands
    if x is None or weight is None or (bias is None) != (given["bias"] is None):
        return None
    if any(n is not None and n.op != "get_attr" for n in (weight, bias)):
        return None
    values = [n.meta["val"] for n in operands if n is not None]
    chosen = route.bind(node.args, node.kwargs)
    width = values[1].shape[1]
    fits = (
        (chosen["gate"] or values[1].shape[0]) <= _MOST_EXPERTS
        and width <= _WIDEST
        and width % 8 == 0
        and chosen["k"] + chosen["shared"] <= _MOST_CHOICES
    )
    alike = values[0].dtype in _NARROW and all(v.dtype is values[0].dtype for v in values)
    if not fits or not alike or values[0].dim() != 2:
        return None
    return {"x": x, "weight": weight, "bias": bias, "wide": wide}


def _narrow(node: fx.Node | None) -> fx.Node | None:
    """What a cast to float32 widens."""
    if node is None or not is_call(node, aten._to_copy.default):
        return None
    return node.args[0] if set(node.kwargs) == {"dtype"} else None  # type: ignore[return-value]


def _norm(x: fx.Node) -> fx.Node | None:
    """The norm whose rows, all of them and whole, x is."""
    norm = x
    if is_call(x, aten.reshape.default):
        norm = x.args[0]  # type: ignore[assignment]
    if not is_call(norm, rms_norm.overload):
        return None
    form = rms_norm.bind(norm.args, norm.kwargs)
    before, after = form["x"].meta["val"], norm.meta["val"]
    weight = form["weight"]
    width = x.meta["val"].shape[-1]
    # Three dimensions that flatten and unflatten without asking how many tokens there are.
    flat = after.dim() == 2 or (after.dim() == 3 and isinstance(after.shape[0], int))
    if not flat or (after.dim() == 3 and after.shape[0] != 1) or after.shape[-1] != width:
        return None
    if weight is not None and (
        weight.op != "get_attr" or weight.meta["val"].dtype is not x.meta["val"].dtype
    ):
        return None
    return norm if before.dtype is after.dtype is x.meta["val"].dtype else None
