"""Units: weights taken apart into blocks of one shape, and joined from them in another order.

A stack of experts is a row of matrices, whatever parameters it came from, and so is an MLP's weight
that is to be part of it. Nothing is read here: units say where in the checkpoint their numbers are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import fx

from .program import Program, Weight
from .walk import behind_views


@dataclass(frozen=True)
class Units:
    """Blocks `start` to `stop` of a checkpoint tensor, each of one shape."""

    piece: str
    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    beside: bool = False
    """They lie side by side in the tensor's rows, not one after the other."""

    def each(self) -> list[Units]:
        """One by one."""
        return [replace(self, start=at, stop=at + 1) for at in range(self.start, self.stop)]


def units_of(
    program: Program, node: fx.Node, shape: tuple[int, ...], beside: bool = False
) -> list[Units]:
    """The blocks of `shape`, in order, of a weight that a node reads or is a view of.

    beside: the weight has them side by side in its rows. Empty if it is not made of such blocks, or
    something else reads it too.
    """
    read = behind_views(node)
    weight = program.weights.get(str(read.target)) if read.op == "get_attr" else None
    if weight is None or len(read.users) != 1:
        return []
    if beside:
        whole = len(weight.pieces) == 1 and not weight.order and len(weight.shape) == 2
        if not whole or weight.shape[0] != shape[0] or weight.shape[1] % shape[1]:
            return []
        count = weight.shape[1] // shape[1]
        return [Units(weight.pieces[0], 0, count, shape, weight.dtype, beside=True)]
    runs = _runs(program, weight)
    size = math.prod(shape)
    if any(piece < 0 or first % size or last % size for piece, first, last in runs):
        return []
    return [
        Units(weight.pieces[piece], first // size, last // size, shape, weight.dtype)
        for piece, first, last in runs
    ]


def _runs(program: Program, weight: Weight) -> list[tuple[int, int, int]]:
    """(piece, first, last) of the numbers of each piece that lie together, in a weight's order."""
    before = math.prod(weight.shape[: weight.dimension])
    after = math.prod(weight.shape[weight.dimension + 1 :])
    extents = [program.source.originals[p].numel() // (before * after) for p in weight.pieces]
    order = weight.order or [(p, 0, extent) for p, extent in enumerate(extents)]
    return [
        (piece, (turn * extents[piece] + start) * after, (turn * extents[piece] + stop) * after)
        for turn in range(before)
        for piece, start, stop in order
    ]


def joined(
    program: Program, name: str, units: Iterable[Units], before: fx.Node, padding: int = 0
) -> fx.Node:
    """A weight [blocks + padding, *shape] of units one after the other, and then zeros."""
    units = list(units)
    kinds = list(dict.fromkeys((unit.piece, unit.beside) for unit in units))
    order = [(kinds.index((u.piece, u.beside)), u.start, u.stop) for u in units]
    if padding:
        order.append((-1, 0, padding))
    total = padding + sum(unit.stop - unit.start for unit in units)
    weight = Weight(
        tuple(piece for piece, _ in kinds), (total, *units[0].shape), units[0].dtype, 0,
        tuple(order), tuple(at for at, (_, beside) in enumerate(kinds) if beside),
    )  # fmt: skip
    return program.add_weight(name, weight, before)
