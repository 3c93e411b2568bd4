"""norm_ahead: a product that finishes the residual stream leaves what the next norm takes.

    add_linear(r, x, v)
    y = fused_linear(r, weight, norm_weight=w, norm=True)
becomes
    scaled, squares = add_linear_scaled(r, x, v, next_weight=w)
    y = fused_linear(r, weight, norm_weight=w, norm=True, scaled=scaled, squares=squares)

With a number of tokens for which the products run on a kernel of ours, the norm between them then
is no launch (see `add_linear_scaled`). Where others read the same rows with the same norm, they get
the same; those with another norm stay as they are. Spared are rows that something else has written
last, or that are chosen in between, as the head's are. In bfloat16 alone: float16 may overflow
before the root is there to divide by, and float32 has no kernel.
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
        old, *readers = site.nodes
        _, weight, offset, rounded = _norm_of(readers[0])
        if weight is not None and not weight < old:
            old.prepend(weight)
        given = add_linear.bind(old.args, old.kwargs)
        new = program.call(
            add_linear_scaled.overload, *given.values(), weight, offset, rounded, before=old,
            like=old,
        )  # fmt: skip
        scaled, squares = (
            program.call(operator.getitem, new, part, before=old, like=old) for part in (0, 1)
        )
        for reader in readers:
            reader.kwargs = {**reader.kwargs, "scaled": scaled, "squares": squares}
        program.graph.erase_node(old)


def _sites_on(stream: fx.Node, places: dict[fx.Node, int]) -> Iterable[Site]:
    """Each sum onto a residual stream that products with one norm read before the next one."""
    shares = {stream, *views_of(stream)}
    users = {user for node in shares for user in node.users}
    writers = sorted((user for user in users if _writes(user, shares)), key=places.__getitem__)
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in sorted(users, key=places.__getitem__):
        if is_call(node, fused_linear.overload):
            before = [writer for writer in writers if places[writer] < places[node]]
            if before and _can_read(node, stream, before[-1]):
                readers.setdefault(before[-1], []).append(node)
    for writer, nodes in readers.items():
        form = _norm_of(nodes[0])
        yield Site((writer, *(node for node in nodes if _norm_of(node) == form)))


def _writes(node: fx.Node, shares: set[fx.Node]) -> bool:
    """Whether a call may write to one of `shares`."""
    if isinstance(node.target, torch._ops.OpOverload):
        return not shares.isdisjoint(written_by(node))
    return node.op != "output" and has_effect(node)


def _can_read(node: fx.Node, stream: fx.Node, writer: fx.Node) -> bool:
    """Whether a fused linear norms all of `stream` as `writer`, a sum onto all of it, left it."""
    given: Any = fused_linear.bind(node.args, node.kwargs)
    if not given["norm"] or given["scaled"] is not None or whole_of(given["x"]) is not stream:
        return False
    if not is_call(writer, add_linear.overload) or _stream_of(writer) is not stream:
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


def _norm_of(node: fx.Node) -> tuple[bool, fx.Node | None, float, bool]:
    """What decides how rows are scaled by the norm of a fused linear."""
    given = fused_linear.bind(node.args, node.kwargs)
    names = ("norm", "norm_weight", "norm_offset", "cast_before_weight")
    norm, weight, offset, rounded = (given[name] for name in names)
    return norm, weight, offset, rounded
