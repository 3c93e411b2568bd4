"""fuse_router: the most usual way to choose experts becomes one op.

    p = softmax(logits, -1, float32); values, index = topk(p, k)
    weights = _to_copy(values / sum(values, -1, True), bfloat16)
becomes
    index, weights = route(logits, k, normalize=True, dtype=bfloat16)

The division and the casts are optional. A softmax of the k largest logits alone is the same as a
normalized one of all. Other routers, such as those over groups of experts, stay as they are.
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
            if not is_call(node, aten.topk.default) or not _is_top_of_all(node):
                continue
            if _is_top_of_softmax(node) or _softmax_of_top(node) is not None:
                yield Site((node,))

    def rewrite(self, program: Program, site: Site) -> None:
        top = site.nodes[0]
        logits = top.args[0]
        assert isinstance(logits, fx.Node)
        values, indices = _parts(top)
        after = _softmax_of_top(top)
        if after is not None:
            weights, normalize = after, True
        else:
            logits = logits.args[0]
            assert isinstance(logits, fx.Node)
            weights, normalize = _normalized(values)
        if _widens(logits) and len(logits.users) == 1:
            logits = logits.args[0]
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


def _is_top_of_all(top: fx.Node) -> bool:
    """The largest along the last dimension, values and indices both read."""
    last = top.args[0].meta["val"].dim() - 1  # type: ignore[union-attr]
    largest = top.args[3] if len(top.args) > 3 else top.kwargs.get("largest", True)
    dimension = top.args[2] if len(top.args) > 2 else top.kwargs.get("dim", -1)
    return (
        largest is True
        and dimension in (-1, last)
        and isinstance(top.args[1], int)
        and [user.args[1] for user in top.users] in ([0, 1], [1, 0])
    )


def _is_top_of_softmax(top: fx.Node) -> bool:
    """Of a float32 softmax along the last dimension that nothing else reads."""
    softmax = top.args[0]
    if not is_call(softmax, aten.softmax.int) or len(softmax.users) != 1:  # type: ignore[union-attr]
        return False
    assert isinstance(softmax, fx.Node)
    return (
        softmax.args[1] in (-1, softmax.meta["val"].dim() - 1)
        and softmax.meta["val"].dtype is torch.float32
        and softmax.args[0].meta["val"].dtype.is_floating_point  # type: ignore[union-attr]
    )


def _softmax_of_top(top: fx.Node) -> fx.Node | None:
    """The softmax along the last dimension that is all that reads the largest logits."""
    (values, _) = _parts(top)
    (softmax, *others) = values.users or [None]
    if others or softmax is None or not is_call(softmax, aten.softmax.int):
        return None
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    dtypes = [node.meta["val"].dtype for node in (values, softmax)]
    along = softmax.args[1] in (-1, values.meta["val"].dim() - 1)
    return softmax if along and all(dtype in narrow for dtype in dtypes) else None


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
