"""norm_ahead: a product that finishes the residual stream leaves what the next norm takes.

    add_linear(r, x, v)
    y = fused_linear(r, weight, norm_weight=w, norm=True)
becomes
    scaled, squares = add_linear_scaled(r, x, v, next_weight=w)
    y = fused_linear(r, weight, norm_weight=w, norm=True, scaled=scaled, squares=squares)

With a number of tokens for which the products run on a kernel of ours, the norm between them then
is no launch (see `add_linear_scaled`). Where several norms read the same rows, the first gets them.
Spared are rows that something else has written last, or that are chosen in between, as the head's
are. In bfloat16 alone: float16 may overflow before the root is there to divide by, and float32 has
no kernel.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autodeploy.custom_ops.linear import add_linear, add_linear_scaled, fused_linear

from ..program import Fact, Program, has_effect
from ..regions import written_by
from ..transform import Site, Transform, is_call, register_transform
from .add_in_place import is_new, views_of, whole_of


@register_transform("norm_ahead")
@dataclass(frozen=True)
class NormAhead(Transform):
    """Moves norms into the products before and after. `devices`: types of device to do it on."""

    breaks = frozenset({Fact.CANONICAL, Fact.FUNCTIONAL})
    devices: tuple[str, ...] = ("cuda",)

    def sites(self, program: Program) -> Iterable[Site]:
        if program.contract.device.type not in self.devices:
            return
        places = {node: place for place, node in enumerate(program.graph.nodes)}
        sums = [node for node in places if is_call(node, add_linear.overload)]
        for stream in dict.fromkeys(_stream_of(node) for node in sums):
            if is_new(stream):
                yield from _sites_on(stream, places)

    def rewrite(self, program: Program, site: Site) -> None:
        old, reader = site.nodes
        given = fused_linear.bind(reader.args, reader.kwargs)
        form = [given[name] for name in ("norm_weight", "norm_offset", "cast_before_weight")]
        if form[0] is not None and not form[0] < old:
            old.prepend(form[0])
        new = program.call(
            add_linear_scaled.overload, *add_linear.bind(old.args, old.kwargs).values(), *form,
            before=old, like=old,
        )  # fmt: skip
        names = ("scaled", "squares")
        parts = [program.call(operator.getitem, new, at, before=old, like=old) for at in (0, 1)]
        reader.kwargs = {**reader.kwargs, **dict(zip(names, parts, strict=True))}
        program.graph.erase_node(old)


def _sites_on(stream: fx.Node, places: dict[fx.Node, int]) -> Iterable[Site]:
    """Each sum onto a residual stream, and the first normed product that reads it."""
    shares = {stream, *views_of(stream)}
    users = {user for node in shares for user in node.users}
    last: Any = None
    for node in sorted(users, key=places.__getitem__):
        if last is not None and _can_read(node, stream, last):
            yield Site((last, node))
            last = None
        if _writes(node, shares):
            last = node if _adds_onto(node, stream) else None


def _adds_onto(node: fx.Node, stream: fx.Node) -> bool:
    """Whether a call is a sum in place onto all of `stream`."""
    return is_call(node, add_linear.overload) and _stream_of(node) is stream


def _writes(node: fx.Node, shares: set[fx.Node]) -> bool:
    """Whether a call may write to one of `shares`."""
    if isinstance(node.target, torch._ops.OpOverload):
        return not shares.isdisjoint(written_by(node))
    return node.op != "output" and has_effect(node)


def _can_read(node: fx.Node, stream: fx.Node, writer: fx.Node) -> bool:
    """Whether a fused linear norms all of `stream`, onto which `writer` has added."""
    if not is_call(node, fused_linear.overload):
        return False
    given: Any = fused_linear.bind(node.args, node.kwargs)
    if not given["norm"] or given["scaled"] is not None or whole_of(given["x"]) is not stream:
        return False
    scale = given["norm_weight"]
    if scale is not None and scale.op != "get_attr" and not scale < writer:
        return False
    made = add_linear.bind(writer.args, writer.kwargs)
    factors = [made["weight"], given["weight"], *([] if scale is None else [scale])]
    # Symbols compare by expression: never ask the shape environment, which would guard.
    widths = {str(n.meta["val"].shape[-1]) for n in (given["x"], made["residual"])}
    return len(widths) == 1 and all(n.meta["val"].dtype is torch.bfloat16 for n in factors)


def _stream_of(node: fx.Node) -> Any:
    """What a sum in place is added onto."""
    return whole_of(add_linear.bind(node.args, node.kwargs)["residual"])
