"""fuse_router: the most usual way to choose experts becomes one op.

    p = softmax(logits, -1, float32); values, index = topk(p, k)
    weights = _to_copy(values / sum(values, -1, True), bfloat16)
becomes
    index, weights = route(logits, k, normalize=True, dtype=bfloat16)

The division and the casts are optional. Other routers, such as those over groups of experts, stay
as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from autodeploy.custom_ops.moe import route

from ..program import Fact, Program
from ..transform import Site, Transform, is_call, register_transform

aten = torch.ops.aten


@register_transform("fuse_router")
@dataclass(frozen=True)
class FuseRouter(Transform):
    """Joins softmax and top k. `devices`: types of device on which there is a kernel for it."""

    needs = frozenset({Fact.CANONICAL})
    devices: tuple[str, ...] = ("cuda",)

    def sites(self, program: Program) -> Iterable[Site]:
        if program.contract.device.type not in self.devices:
            return
        for node in program.graph.nodes:
            if is_call(node, aten.topk.default) and _is_top_of_softmax(node):
                yield Site((node,))

    def rewrite(self, program: Program, site: Site) -> None:
        top = site.nodes[0]
        softmax = top.args[0]
        assert isinstance(softmax, fx.Node)
        logits = softmax.args[0]
        assert isinstance(logits, fx.Node)
        if _widens(logits) and len(logits.users) == 1:
            logits = logits.args[0]
        values, indices = _parts(top)
        weights, normalize = _normalized(values)
        cast = _only_cast(weights)
        if cast is not None:
            weights = cast
        chosen = program.call(
            route.overload, logits, top.args[1], normalize, weights.meta["val"].dtype,
            before=top, like=top,
        )  # fmt: skip
        for place, old in enumerate((indices, weights)):
            new = program.call(operator.getitem, chosen, place, before=top, like=old)
            old.replace_all_uses_with(new)


def _is_top_of_softmax(top: fx.Node) -> bool:
    """The largest along the last dimension of a float32 softmax that nothing else reads."""
    softmax = top.args[0]
    if not is_call(softmax, aten.softmax.int) or len(softmax.users) != 1:  # type: ignore[union-attr]
        return False
    assert isinstance(softmax, fx.Node)
    last = softmax.meta["val"].dim() - 1
    largest = top.args[3] if len(top.args) > 3 else top.kwargs.get("largest", True)
    dimensions = (softmax.args[1], top.args[2] if len(top.args) > 2 else top.kwargs.get("dim", -1))
    return (
        largest is True
        and all(dimension in (-1, last) for dimension in dimensions)
        and isinstance(top.args[1], int)
        and softmax.meta["val"].dtype is torch.float32
        and softmax.args[0].meta["val"].dtype.is_floating_point  # type: ignore[union-attr]
        and [user.args[1] for user in top.users] in ([0, 1], [1, 0])
    )


def _parts(top: fx.Node) -> tuple[fx.Node, fx.Node]:
    """What `topk` returns: values and indices."""
    parts = {user.args[1]: user for user in top.users}
    return parts[0], parts[1]


def _normalized(values: fx.Node) -> tuple[fx.Node, bool]:
    """The values divided by their own sum, and True; themselves and False if they are not."""
    last = values.meta["val"].dim() - 1
    for total in values.users:
        if not is_call(total, aten.sum.dim_IntList) or total.kwargs or len(total.args) != 3:
            continue
        (quotient, *others) = total.users
        divided = is_call(quotient, aten.div.Tensor) and quotient.args == (values, total)
        if (
            divided
            and not others
            and set(values.users) == {total, quotient}
            and total.args[1] in ([-1], [last])
            and total.args[2] is True
        ):
            return quotient, True
    return values, False


def _only_cast(weights: fx.Node) -> fx.Node | None:
    """The cast that is all that reads the weights, if it is one and to a narrower float."""
    (first, *others) = weights.users or [None]
    if others or first is None or not is_call(first, aten._to_copy.default):
        return None
    narrow = first.kwargs.get("dtype")
    if set(first.kwargs) != {"dtype"} or narrow not in (torch.bfloat16, torch.float16):
        return None
    return first


def _widens(node: fx.Node) -> bool:
    """A cast of a narrower float to float32, which `route` does itself."""
    return (
        is_call(node, aten._to_copy.default)
        and set(node.kwargs) == {"dtype"}
        and node.kwargs["dtype"] is torch.float32
        and node.args[0].meta["val"].dtype in (torch.bfloat16, torch.float16)  # type: ignore[union-attr]
    )
