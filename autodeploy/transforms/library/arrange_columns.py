"""arrange_columns: weights have their rows in the order in which the graph reads the product.

    q, k, z = split(reshape(linear(x, w), [1, T, G, 3 D]), [D, D, D], -1)
    qk = cat([reshape(q, [1, T, G D]), reshape(k, [1, T, G D])], -1); z = reshape(z, [1, T, G D])
becomes
    qk, z = split(linear(x, w[order]), [2 G D, G D], -1)

Heads that are stored with the parts of one next to each other must otherwise be gathered in each
step: a launch, and a pass over what the product wrote. Weights are put in order as they are loaded.
Products whose numbers are read in place already stay as they are, but for rows that are not a
multiple of 16 bytes: kernels are slow where they begin at odd addresses, so zeros are added.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..columns import Columns
from ..program import Fact, Program, Weight
from ..transform import Site, Transform, is_call, register_transform
from ..walk import MOVES

aten = torch.ops.aten

_ALIGNMENT = 16
"""Bytes."""
_NOTES = "arrange_columns"


@register_transform("arrange_columns")
@dataclass(frozen=True)
class ArrangeColumns(Transform):
    """Orders the rows of weights of linears. `devices`: types of device to do it on."""

    needs = frozenset({Fact.FUNCTIONAL, Fact.CANONICAL, Fact.LAZY_WEIGHTS})
    devices: tuple[str, ...] = ("cuda",)

    def sites(self, program: Program) -> Iterable[Site]:
        if program.contract.device.type not in self.devices:
            return
        columns = Columns(program)
        orders: dict[fx.Node, list[torch.Tensor]] = {}
        for node in program.graph.nodes:
            if not is_call(node, aten.linear.default) or not _is_own(program, node):
                continue
            ends = _ends(node)
            order = _order(node, ends, columns)
            if order is not None and (_gathers(order) or _lacks(node, ends)):
                orders[node] = order
                yield Site((node, *ends))
        program.options[_NOTES] = orders

    def rewrite(self, program: Program, site: Site) -> None:
        linear, *ends = site.nodes
        order = program.options[_NOTES][linear]
        rows = torch.cat([part.flatten() for part in order])
        sizes = [part.numel() for part in order]
        padding = _lacks(linear, ends)
        if padding:
            sizes.append(padding)
        weights = [_ordered(program, weight, rows, padding, linear) for weight in linear.args[1:]]
        product = program.call(
            aten.linear.default, linear.args[0], *weights, before=linear, like=linear
        )
        parts = program.call(
            aten.split_with_sizes.default, product, sizes, -1, before=linear, like=linear
        )
        for index, (end, part) in enumerate(zip(ends, order, strict=True)):
            taken = program.call(operator.getitem, parts, index, before=linear, like=linear)
            if part.dim() > 1:
                shape = [*[1] * (linear.meta["val"].dim() - 2), -1, *part.shape]
                taken = program.call(aten.reshape.default, taken, shape, before=linear, like=end)
            end.replace_all_uses_with(taken)

    def finish(self, program: Program) -> None:
        program.options.pop(_NOTES, None)


def _is_own(program: Program, linear: fx.Node) -> bool:
    """Weight [N, K] and bias are the checkpoint's, and read by this linear alone."""
    return not linear.kwargs and all(
        isinstance(weight, fx.Node)
        and weight.op == "get_attr"
        and len(weight.users) == 1
        and weight.target in program.weights
        and program.weights[str(weight.target)].dimension == 0
        and not program.weights[str(weight.target)].order
        and weight.meta["val"].dim() == (2 if place == 0 else 1)
        for place, weight in enumerate(linear.args[1:])
        if weight is not None
    )


def _ends(linear: fx.Node) -> list[fx.Node]:
    """The last tensors [.., T, ..] on every way from a product [.., T, N] on which numbers move.

    Wide ones first, which then begin at aligned places.
    """
    ends: dict[fx.Node, int] = {}
    pending = [linear]
    seen = {linear}
    while pending:
        node = pending.pop(0)
        further = [user for user in node.users if _keeps_tokens(user, linear)]
        value = node.meta["val"]
        if isinstance(value, torch.Tensor) and len(further) < len(node.users):
            ends[node] = _row_width(value, linear)
        pending += [user for user in further if user not in seen]
        seen.update(further)
    return sorted(ends, key=lambda node: -ends[node])


def _row_width(value: torch.Tensor, linear: fx.Node) -> int:
    return math.prod(int(size) for size in value.shape[linear.meta["val"].dim() - 1 :])


def _keeps_tokens(node: fx.Node, linear: fx.Node) -> bool:
    """Whether numbers only move, and those of a token into dimensions after the one of tokens."""
    if not is_call(node, *MOVES):
        return False
    value: Any = node.meta["val"]
    tokens = [str(size) for size in linear.meta["val"].shape[:-1]]
    return all(
        part.dim() > len(tokens)
        and [str(size) for size in part.shape[: len(tokens)]] == tokens
        and all(isinstance(size, int) for size in part.shape[len(tokens) :])
        for part in (value if isinstance(value, (list, tuple)) else [value])
    )


def _order(linear: fx.Node, ends: list[fx.Node], columns: Columns) -> list[torch.Tensor] | None:
    """The column of the product behind each number of a row of each end.

    None if some are read twice, by nothing, or elsewhere than in an end, or are not columns.
    """
    if len(ends) < 2 or linear in ends or any(s != 1 for s in linear.meta["val"].shape[:-2]):
        return None
    order = []
    for end in ends:
        found = columns.of(end)
        source = None if found is None else columns.source(found.flatten())
        if found is None or source is None or source[0] is not linear:
            return None
        order.append(source[1].view(found.shape[linear.meta["val"].dim() - 2 :]))
    rows = torch.cat([part.flatten() for part in order])
    width = int(linear.meta["val"].shape[-1])
    return order if torch.equal(rows.sort().values, torch.arange(width)) else None


def _gathers(order: list[torch.Tensor]) -> bool:
    """Whether some end cannot be a view of the product."""
    return any(not _is_strided(part) for part in order)


def _is_strided(part: torch.Tensor) -> bool:
    """Whether places in a row go up by one step along each dimension."""
    first = part.flatten()[0]
    expected = first
    for dimension, size in enumerate(part.shape):
        step = part.select(dimension, min(1, size - 1)).flatten()[0] - first
        shape = [size if at == dimension else 1 for at in range(part.dim())]
        expected = expected + (torch.arange(size) * step).view(shape)
    return torch.equal(expected.expand_as(part), part)


def _lacks(linear: fx.Node, ends: list[fx.Node]) -> int:
    """Columns that a product lacks for its rows to begin at aligned addresses."""
    value = linear.meta["val"]
    return -int(value.shape[-1]) % max(1, _ALIGNMENT // value.dtype.itemsize)


def _ordered(
    program: Program, node: Any, rows: torch.Tensor, padding: int, before: fx.Node
) -> fx.Node | None:
    """The weight of a linear with its rows in another order, zeros after them."""
    if node is None:
        return None
    name = str(node.target)
    weight = program.weights[name]
    order = []
    starts = _starts(program, weight)
    # Runs of rows that follow each other.
    breaks = [0, *(1 + torch.nonzero(rows.diff() != 1).flatten()).tolist(), len(rows)]
    for begin, end in zip(breaks, breaks[1:], strict=False):
        order += _within_pieces(starts, int(rows[begin]), end - begin)
    if padding:
        order.append((-1, 0, padding))
    shape = (weight.shape[0] + padding, *weight.shape[1:])
    made = Weight(weight.pieces, shape, weight.dtype, 0, tuple(order))
    return program.add_weight(f"{name}_ordered", made, before)


def _starts(program: Program, weight: Weight) -> list[int]:
    """The first row of each piece, and the number of rows."""
    rest = math.prod(weight.shape[1:])
    starts = [0]
    for piece in weight.pieces:
        starts.append(starts[-1] + program.source.originals[piece].numel() // rest)
    return starts


def _within_pieces(starts: list[int], row: int, count: int) -> list[tuple[int, int, int]]:
    """Rows `row` to `row + count` of a weight as (piece, start, stop)."""
    found = []
    for piece, (first, stop) in enumerate(zip(starts, starts[1:], strict=False)):
        begin, end = max(row, first), min(row + count, stop)
        if begin < end:
            found.append((piece, begin - first, end - first))
    return found
