"""What a module holds one of per expert, and every way in which the experts op could use it.

Experts are stacked in one parameter ([E, a, b], or flattened to [E * a, b]), or they are the
members of a list of modules that look alike. Shapes leave a few layouts; which one it is, only
evaluation can tell (`expert_loops`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Stack:
    """One matrix [rows, columns] per expert, or one vector [rows] where `columns` is 0."""

    pieces: tuple[str, ...]
    """Parameters: one that holds all experts, or one of each expert."""
    experts: int
    rows: int
    columns: int = 0

    def of(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[E, rows, columns] or [E, rows], a view unless it is made of pieces."""
        parts = [parameters[name] for name in self.pieces]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        stacked = whole.view(-1, *((self.rows, self.columns) if self.columns else (self.rows,)))
        return stacked if stacked.shape[0] == self.experts else stacked[: self.experts]


@dataclass(frozen=True)
class Stacking:
    """All stacks of a module, read as those of `total` experts: the last may have no weights."""

    stacks: tuple[Stack, ...]
    total: int
    flattened: bool = False
    """The number of experts is a guess: any number that the module holds and that divides."""

    def fits(self, hidden: int) -> bool:
        """Whether its matrices have a layout; vectors may be a router's."""
        return any(layouts((stack for stack in self.stacks if stack.columns), hidden))


@dataclass(frozen=True)
class Layout:
    """Which stack is what."""

    up: tuple[Stack, ...]
    """Gate and up in one, or one after the other."""
    down: Stack
    up_bias: tuple[Stack, ...]
    down_bias: Stack | None
    up_transposed: bool
    down_transposed: bool
    gated: bool
    interleaved: bool

    def arguments(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Arguments of the experts op."""
        down = self.down.of(parameters)
        if self.down_transposed != self.up_transposed:
            down = down.transpose(1, 2)
        side = 2 if self.up_transposed else 1
        return {
            "gate_up": _side_by_side(self.up, parameters, side),
            "down": down,
            "gate_up_bias": _side_by_side(self.up_bias, parameters, 1) if self.up_bias else None,
            "down_bias": self.down_bias.of(parameters) if self.down_bias else None,
            "gated": self.gated,
            "interleaved": self.interleaved,
            "transposed": self.up_transposed,
        }


def _side_by_side(
    stacks: tuple[Stack, ...], parameters: Mapping[str, torch.Tensor], dimension: int
) -> torch.Tensor:
    if len(stacks) > 1 and len(stacks[0].pieces) > 1:
        # Expert by expert, so that one join of whole parameters makes it.
        experts = zip(*(stack.pieces for stack in stacks), strict=True)
        pieces = tuple(name for expert in experts for name in expert)
        rows = sum(stack.rows for stack in stacks)
        return Stack(pieces, stacks[0].experts, rows, stacks[0].columns).of(parameters)
    values = [stack.of(parameters) for stack in stacks]
    return values[0] if len(values) == 1 else torch.cat(values, dimension)


def stackings(module: nn.Module, numbers: Iterable[int]) -> Iterator[Stacking]:
    """Ways to read the parameters of a module as stacks; `numbers` may count its experts."""
    listed: list[str] = []
    for path, part in module.named_modules():
        if isinstance(part, nn.ModuleList):
            listed.append(f"{path}." if path else "")
            found = _members(part, listed[-1])
            if found is not None:
                yield found
    own = {
        name: tuple(p.shape)
        for name, p in module.named_parameters()
        if not any(name.startswith(prefix) for prefix in listed)
    }
    counts = sorted({shape[0] for shape in own.values() if len(shape) == 3})
    for count in counts:
        yield Stacking(tuple(_whole(own, count)), counts[-1])
    for count in sorted({*numbers}) if not counts else ():
        stacks = tuple(_flattened(own, count))
        if count > 1 and stacks:
            yield Stacking(stacks, count, flattened=True)


def _members(part: nn.ModuleList, prefix: str) -> Stacking | None:
    """Members that look alike, the last of them perhaps without parameters."""
    members = [dict(member.named_parameters()) for member in part]
    experts = sum(bool(member) for member in members)
    shapes = [{name: tuple(p.shape) for name, p in m.items()} for m in members[:experts]]
    if experts < 2 or any(s != shapes[0] or not s for s in shapes):
        return None
    if any(len(shape) not in (1, 2) for shape in shapes[0].values()):
        return None
    return Stacking(
        tuple(
            Stack(tuple(f"{prefix}{i}.{name}" for i in range(experts)), experts, *shape)
            for name, shape in shapes[0].items()
        ),
        len(members),
    )


def _whole(own: Mapping[str, tuple[int, ...]], count: int) -> Iterator[Stack]:
    for name, shape in own.items():
        if len(shape) == 3 and shape[0] >= count:
            yield Stack((name,), count, shape[1], shape[2])
        elif len(shape) == 2 and shape[0] == count:
            yield Stack((name,), count, shape[1])


def _flattened(own: Mapping[str, tuple[int, ...]], count: int) -> Iterator[Stack]:
    for name, shape in own.items():
        if len(shape) == 2 and shape[0] == count:
            yield Stack((name,), count, shape[1])
        elif len(shape) == 2 and count > 0 and shape[0] % count == 0:
            yield Stack((name,), count, shape[0] // count, shape[1])


def layouts(stacks: Iterable[Stack], hidden: int) -> Iterator[Layout]:
    """Layouts in which the shapes fit hidden states of size `hidden`."""
    stacks = tuple(stacks)
    matrices = [stack for stack in stacks if stack.columns]
    vectors = [stack for stack in stacks if not stack.columns]
    if len(matrices) not in (2, 3) or len(vectors) not in (0, len(matrices)):
        return
    for (*up, down), up_transposed, down_transposed, biases in product(
        permutations(matrices), (False, True), (False, True), permutations(vectors)
    ):
        width, inner = (down.columns, down.rows) if down_transposed else (down.rows, down.columns)
        sizes = [(s.rows, s.columns) if up_transposed else (s.columns, s.rows) for s in up]
        listed = len(down.pieces) > 1
        if width != hidden or any(size[0] != hidden for size in sizes):
            continue
        if len(up) == 2 and listed and up_transposed:
            # Only whole parameters are joined.
            continue
        outer = [size[1] for size in sizes]
        if [b.rows for b in biases] not in ([], [*outer, width]):
            continue
        if outer not in ([inner], [2 * inner], [inner, inner]):
            continue
        gated = sum(outer) == 2 * inner
        for interleaved in (False, True) if outer == [2 * inner] else (False,):
            yield Layout(
                tuple(up), down, biases[:-1], biases[-1] if biases else None,
                up_transposed, down_transposed, gated, interleaved,
            )  # fmt: skip
