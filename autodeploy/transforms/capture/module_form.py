"""ModuleForm: what one call of a part of the model means, in terms of tokens.

Made of recordings (see `module_probe`): which arguments have one row per token, which are masks,
what comes out, what has to be kept per token and per sequence, and two templates of arguments to
call the part with: for the first tokens of a sequence, and for later ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import CaptureError
from .module_probe import LENGTHS, MORE, Call, Recorded, changed
from .object_state import Path, leaves

_LATER = tuple(n + m for n, m in zip(LENGTHS, MORE, strict=True))
Index = tuple[Any, ...]


@dataclass(frozen=True)
class Rows:
    """A tensor with one row per token."""

    path: Path
    dimension: int
    """Where the tokens are."""
    shape: tuple[int, ...]
    """Without tokens."""
    dtype: torch.dtype
    whole: bool = False
    """Later calls take the rows of all tokens of the sequence, earlier ones included."""

    def first(self, value: torch.Tensor) -> torch.Tensor:
        """The tensor with its tokens first."""
        return value.movedim(self.dimension, 0)

    def back(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of `first`."""
        return rows.movedim(0, self.dimension)


@dataclass(frozen=True)
class State:
    """A tensor of a fixed size that the part changes, or the only slice of it that changes."""

    path: Path
    index: Index
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def whole(self) -> bool:
        """Whether nobody else's state is in the same tensor."""
        return all(part == slice(None) for part in self.index)


@dataclass(frozen=True)
class Handed:
    """A state that a call gives out and the next call of the same part takes as an argument."""

    argument: Path
    output: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class ModuleForm:
    """Everything needed to call a part for a few tokens of one sequence."""

    path: str
    inputs: tuple[Rows, ...]
    masks: tuple[Path, ...]
    outputs: tuple[Rows, ...]
    output_template: Any
    kept: tuple[Rows, ...]
    states: tuple[State, ...]
    handed: tuple[Handed, ...]
    counters: Mapping[Path, int]
    """Numbers that are the count of earlier tokens, plus this."""
    others: tuple[Rows, ...]
    """Rows that other parts keep in the same cache: only their number is ever looked at."""
    ahead: frozenset[Path]
    """Those of `others` that have the new tokens already when this part is called."""
    alone: Call
    first: Call | None
    later: Call | None


def form_of(path: str, recorded: Recorded, index: int, *, keeps: bool = False) -> ModuleForm:
    """The form of the `index`-th call of the part at `path`.

    keeps: the part mixes tokens, so the form needs what it keeps; else calls are looked at
    without a cache only.

    Raises:
        CaptureError: something has no fixed number of rows per token, or cannot be traced.
    """
    alone = [calls[index] for calls in recorded.alone]
    shapes = [leaves(dict(call.arguments.arguments)) for call in alone]
    inputs = _rows(path, shapes[0], shapes[1], LENGTHS, "takes")
    outputs = _rows(
        path, leaves({"out": alone[0].output}), leaves({"out": alone[1].output}), LENGTHS, "gives"
    )
    if not inputs or not outputs:
        raise CaptureError(f"{path} takes or gives nothing that has one row per token")
    if not keeps:
        return ModuleForm(
            path, tuple(inputs), (), tuple(outputs), alone[0].output, (), (), (), {}, (),
            frozenset(),
            alone[0], None, None,
        )  # fmt: skip
    if any(len(calls) <= index for calls in (*recorded.first, *recorded.more)):
        raise CaptureError(f"{path} is called less often with a cache than without")
    first = [calls[index] for calls in recorded.first]
    later = [calls[index] for calls in recorded.more]
    kept, states = _kept(path, first, later)
    masks, whole = _later_arguments(path, inputs, later)
    others, ahead = _others(later, kept)
    return ModuleForm(
        path,
        tuple(Rows(r.path, r.dimension, r.shape, r.dtype, r.path in whole) for r in inputs),
        tuple(masks),
        tuple(outputs),
        alone[0].output,
        tuple(kept),
        tuple(states),
        _handed(first, later),
        _counters(later),
        others,
        ahead,
        alone[0],
        first[0],
        later[0],
    )


def _rows(
    path: str,
    small: Mapping[Path, Any],
    large: Mapping[Path, Any],
    lengths: tuple[int, int],
    verb: str,
) -> list[Rows]:
    """Leaves whose size differs between two runs, each along one dimension, by the tokens."""
    rows = []
    for place, value in small.items():
        other = large.get(place)
        if not isinstance(value, torch.Tensor):
            continue
        if not isinstance(other, torch.Tensor) or value.dim() != other.dim():
            raise CaptureError(f"{path} {verb} {_text(place)} in one run and not in another")
        moving = [d for d in range(value.dim()) if value.shape[d] != other.shape[d]]
        if not moving:
            continue
        if len(moving) == 2 and all((value.shape[d], other.shape[d]) == lengths for d in moving):
            # Rows and columns: a mask, which the caller knows how to make.
            continue
        if len(moving) != 1 or (value.shape[moving[0]], other.shape[moving[0]]) != lengths:
            raise CaptureError(
                f"{path} {verb} {_text(place)} of shape {tuple(value.shape)} for {lengths[0]} "
                f"tokens and {tuple(other.shape)} for {lengths[1]}: no fixed rows per token"
            )
        shape = tuple(n for d, n in enumerate(value.shape) if d != moving[0])
        rows.append(Rows(place, moving[0], shape, value.dtype))
    return rows


def _kept(path: str, first: list[Call], later: list[Call]) -> tuple[list[Rows], list[State]]:
    """What the part's own calls change."""
    places = [
        place
        for place in changed(later[0].before, later[0].after)
        if place in changed(first[0].before, first[0].after)
        or place in changed(later[1].before, later[1].after)
    ]
    missing = [p for p in changed(first[0].before, first[0].after) if p not in later[0].after]
    if missing:
        raise CaptureError(f"{path} keeps {_text(missing[0])} only of a first call")
    kept, states = [], []
    for place in places:
        small, large = later[0].after[place], later[1].after[place]
        if not isinstance(large, torch.Tensor) or small.dim() != large.dim():
            raise CaptureError(f"{path} keeps {_text(place)}, whose form changes")
        moving = [d for d in range(small.dim()) if small.shape[d] != large.shape[d]]
        if not moving:
            index = _changing_slice([(c.before.get(place), c.after[place]) for c in later])
            states.append(State(place, index, tuple(small[index].shape), small.dtype))
        elif len(moving) == 1 and (small.shape[moving[0]], large.shape[moving[0]]) == _LATER:
            shape = tuple(n for d, n in enumerate(small.shape) if d != moving[0])
            kept.append(Rows(place, moving[0], shape, small.dtype))
        else:
            raise CaptureError(
                f"{path} keeps {_text(place)} of shape {tuple(small.shape)} after {_LATER[0]} "
                f"tokens and {tuple(large.shape)} after {_LATER[1]}: neither a row per token nor "
                "a fixed size"
            )
    return kept, states


def _handed(first: list[Call], later: list[Call]) -> tuple[Handed, ...]:
    """Arguments of a second call that are outputs of the first, of a fixed size."""
    outputs = [leaves({"out": call.output}) for call in first]
    taken = [leaves(dict(call.arguments.arguments)) for call in later]
    found = []
    for place, value in taken[0].items():
        if not isinstance(value, torch.Tensor) or value.numel() < 2 or place in later[0].before:
            continue
        for source, result in outputs[0].items():
            if (
                all(
                    isinstance(b.get(source), torch.Tensor) and torch.equal(a[place], b[source])
                    for a, b in zip(taken, outputs, strict=True)
                    if a[place].shape == value.shape == getattr(b.get(source), "shape", None)
                )
                and value.shape == getattr(result, "shape", None) == taken[1][place].shape
            ):
                found.append(Handed(place, source, tuple(value.shape), value.dtype))
                break
    return tuple(found)


def _changing_slice(pairs: list[tuple[Any, torch.Tensor]]) -> Index:
    """Where all changes lie, if a dimension has them at one index only: layers share a tensor."""
    index: list[Any] = [slice(None)] * pairs[0][1].dim()
    for dimension in range(len(index)):
        touched: set[int] = set()
        for before, after in pairs:
            if not isinstance(before, torch.Tensor):
                return tuple(index)
            differs = (before != after).movedim(dimension, 0).flatten(1).any(1)
            touched |= set(differs.nonzero().flatten().tolist())
        if len(touched) == 1 and pairs[0][1].shape[dimension] > 1:
            index[dimension] = touched.pop()
    return tuple(index)


def _later_arguments(
    path: str, inputs: list[Rows], later: list[Call]
) -> tuple[list[Path], set[Path]]:
    """Masks among the arguments of later calls, and inputs that then cover all tokens."""
    small, large = (leaves(dict(call.arguments.arguments)) for call in later)
    holders = {place[: len(place)] for place in later[0].before}
    dimensions = {rows.path: rows.dimension for rows in inputs}
    masks: list[Path] = []
    whole: set[Path] = set()
    for place, value in small.items():
        if not isinstance(value, torch.Tensor) or place in holders:
            continue
        sizes = _moving(value, large[place])
        if place in dimensions:
            at = dimensions[place]
            if (value.shape[at], large[place].shape[at]) == _LATER:
                whole.add(place)
        elif set(sizes) == {MORE, _LATER} or (
            sizes and set(sizes) <= {MORE, _LATER} and value.dim() == 4
        ):
            masks.append(place)
        elif sizes:
            raise CaptureError(
                f"{path} takes {_text(place)} of shape {tuple(value.shape)} with a cache, which "
                "it does not take without"
            )
    return masks, whole


def _moving(a: torch.Tensor, b: Any) -> list[tuple[int, int]]:
    if not isinstance(b, torch.Tensor) or a.dim() != b.dim():
        return [(-1, -1)]
    return [(m, n) for m, n in zip(a.shape, b.shape, strict=True) if m != n]


def _counters(later: list[Call]) -> dict[Path, int]:
    found = {}
    for place, value in later[0].before.items():
        other = later[1].before.get(place)
        if type(value) is int and type(other) is int and other - value == LENGTHS[1] - LENGTHS[0]:
            found[place] = value - LENGTHS[0]
    return found


def _others(later: list[Call], kept: list[Rows]) -> tuple[tuple[Rows, ...], frozenset[Path]]:
    """Rows in the same cache that are other parts'."""
    own = {rows.path for rows in kept}
    rows, ahead = [], set()
    for place, value in later[0].before.items():
        other = later[1].before.get(place)
        if place in own or not isinstance(value, torch.Tensor):
            continue
        if not isinstance(other, torch.Tensor) or other.dim() != value.dim():
            continue
        for dimension, sizes in enumerate(zip(value.shape, other.shape, strict=True)):
            if sizes in (LENGTHS, _LATER):
                shape = tuple(n for d, n in enumerate(value.shape) if d != dimension)
                rows.append(Rows(place, dimension, shape, value.dtype))
                if sizes == _LATER:
                    ahead.add(place)
    return tuple(rows), frozenset(ahead)


def _text(place: Path) -> str:
    return ".".join(str(name) for kind, name in place if name != "") or "an argument"
