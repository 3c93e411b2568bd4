"""Calling a part of a model outside of the model: for some tokens of one sequence, with its past.

The call behind the ops of `custom_ops/module`. Arguments are those that were recorded when the
whole model ran, with the rows of these tokens, their mask and what was kept put in their places.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...errors import EngineError
from .masks import Mask
from .module_form import Handed, ModuleForm, State
from .module_probe import LENGTHS, OWN, Call, holders
from .object_state import Path, get_leaf, leaves, own_attributes, rebuilt, set_leaf

Result = tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]


def call_with(
    part: nn.Module, form: ModuleForm, call: Call, values: Mapping[Path, torch.Tensor]
) -> list[torch.Tensor]:
    """The part's outputs for a recorded call, some of its argument tensors replaced."""
    frame = _Frame(part, call, values)
    frame.run(part)
    return [frame.output(rows.path) for rows in form.outputs]


def mixes_tokens(part: nn.Module, form: ModuleForm) -> bool:
    """Whether a token's output changes when another token's input does, without a cache."""
    generator = torch.Generator().manual_seed(0)
    recorded = leaves(dict(form.alone.arguments.arguments))
    values = {}
    for rows in form.inputs:
        if not rows.dtype.is_floating_point:
            continue
        at: torch.Tensor = recorded[rows.path]
        noise = torch.randn(at.shape, generator=generator).to(at)
        keep = torch.ones(at.shape[rows.dimension], dtype=torch.bool, device=at.device)
        keep[2] = False
        values[rows.path] = torch.where(
            rows.back(keep.view(-1, *[1] * (at.dim() - 1))), at, at + noise
        )
    plain = call_with(part, form, form.alone, {})
    moved = call_with(part, form, form.alone, values)
    return any(
        not torch.allclose(rows.first(a)[t], rows.first(b)[t], rtol=1e-4, atol=1e-5)
        for rows, a, b in zip(form.outputs, plain, moved, strict=True)
        for t in range(LENGTHS[0])
        if t != 2
    )


class ModuleCall:
    """One call of one part of a live model; implements `TokenCall`."""

    def __init__(self, part: nn.Module, form: ModuleForm, masks: Mapping[Path, Mask]) -> None:
        self.name = form.path
        self.kind = type(part).__name__
        self._part = part
        self._form = form
        self._masks = dict(masks)
        whole = tuple(rows for rows in form.inputs if rows.whole)
        self.outputs = tuple((rows.shape, rows.dtype) for rows in form.outputs)
        self.token_caches = tuple((rows.shape, rows.dtype) for rows in (*form.kept, *whole))
        states: list[State | Handed] = [*form.states, *form.handed]
        self.states = tuple((state.shape, state.dtype) for state in states)

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One whole sequence, or tokens that do not see each other, without a cache."""
        frame = self._frame(self._form.alone, inputs, (), 0)
        frame.run(self._part)
        return self._outputs(frame)

    def begin(self, inputs: Sequence[torch.Tensor]) -> Result:
        """The first tokens of a sequence."""
        if self._form.first is None:
            raise EngineError(f"{self.name} was captured as a part that keeps nothing")
        frame = self._frame(self._form.first, inputs, (), 0)
        frame.run(self._part)
        return self._result(frame, inputs, 0)

    def go_on(
        self,
        inputs: Sequence[torch.Tensor],
        past: Sequence[torch.Tensor],
        states: Sequence[torch.Tensor],
    ) -> Result:
        """Tokens after P others; past [P, ...], then states."""
        if self._form.later is None:
            raise EngineError(f"{self.name} was captured as a part that keeps nothing")
        kept, whole = past[: len(self._form.kept)], past[len(self._form.kept) :]
        earlier = len(past[0]) if past else 0
        held, handed = states[: len(self._form.states)], states[len(self._form.states) :]
        frame = self._frame(self._form.later, inputs, whole, earlier, handed)
        self._refill(frame, kept, held, earlier, len(inputs[0]))
        frame.run(self._part)
        return self._result(frame, inputs, earlier)

    def _frame(
        self, call: Call, inputs: Sequence[torch.Tensor], whole: Sequence[torch.Tensor],
        earlier: int, handed: Sequence[torch.Tensor] = (),
    ) -> _Frame:  # fmt: skip
        """A call with the rows of these tokens, and their masks, in place."""
        waiting = list(whole)
        values = {
            each.argument: state.clone()
            for each, state in zip(self._form.handed, handed, strict=bool(handed))
        }
        for rows, given in zip(self._form.inputs, inputs, strict=True):
            value = torch.cat((waiting.pop(0), given)) if rows.whole and waiting else given
            values[rows.path] = rows.back(value)
        recorded = leaves(dict(call.arguments.arguments))
        for path, mask in self._masks.items():
            like = recorded.get(path)
            if isinstance(like, torch.Tensor):
                values[path] = _mask_like(like, mask, len(inputs[0]), earlier)
        return _Frame(self._part, call, values)

    def _refill(
        self, frame: _Frame, kept: Sequence[torch.Tensor], states: Sequence[torch.Tensor],
        earlier: int, new: int,
    ) -> None:  # fmt: skip
        """Puts what was kept where the part will look for it."""
        form = self._form
        for rows, value in zip(form.kept, kept, strict=True):
            frame.set(rows.path, rows.back(value))
        for state, value in zip(form.states, states, strict=True):
            if state.whole:
                # A copy: the part may write to it, and the op writes the row of our cache.
                frame.set(state.path, value.clone())
            else:
                frame.get(state.path)[state.index] = value
        for path, offset in form.counters.items():
            frame.set(path, earlier + offset)
        for rows in form.others:
            count = earlier + new if rows.path in form.ahead else earlier
            like = frame.get(rows.path)
            frame.set(rows.path, rows.back(like.new_zeros(()).expand(count, *rows.shape)))

    def _result(self, frame: _Frame, inputs: Sequence[torch.Tensor], earlier: int) -> Result:
        form = self._form
        end = earlier + len(inputs[0])
        kept = [rows.first(frame.get(rows.path))[earlier:end] for rows in form.kept]
        kept += [x for rows, x in zip(form.inputs, inputs, strict=True) if rows.whole]
        left = [frame.get(state.path)[state.index] for state in form.states]
        left += [frame.output(each.output) for each in form.handed]
        return self._outputs(frame), kept, left

    def _outputs(self, frame: _Frame) -> list[torch.Tensor]:
        return [rows.first(frame.output(rows.path)) for rows in self._form.outputs]


class _Frame:
    """One call being made: its arguments, what holds the past, and its result."""

    def __init__(self, part: nn.Module, call: Call, values: Mapping[Path, torch.Tensor]) -> None:
        signature = call.arguments.signature
        arguments = dict(call.arguments.arguments)
        self._holders = {
            place: copy.deepcopy(value) for place, value in holders(arguments, signature).items()
        }
        replaced: dict[Path, Any] = {**values, **self._holders}
        self._arguments = inspect.BoundArguments(
            signature, {k: rebuilt(v, (("item", k),), replaced) for k, v in arguments.items()}
        )
        self._own = copy.deepcopy(call.own)
        self._result: Any = None

    def get(self, path: Path) -> Any:
        """A leaf of what holds the past."""
        root, rest = self._root(path)
        return get_leaf(root, rest)

    def set(self, path: Path, value: Any) -> None:
        root, rest = self._root(path)
        set_leaf(root, rest, value)

    def output(self, path: Path) -> torch.Tensor:
        """A tensor of the result."""
        value: torch.Tensor = get_leaf({"out": self._result}, path)
        return value

    def run(self, part: nn.Module) -> None:
        with torch.no_grad(), _eager(part), _keeping(part, self._own):
            self._result = type(part).forward(part, *self._arguments.args, **self._arguments.kwargs)
            self._own = own_attributes(part) if self._own else {}

    def _root(self, path: Path) -> tuple[Any, Path]:
        if path[0] == OWN:
            return self._own, path[1:]
        for place, holder in self._holders.items():
            if path[: len(place)] == place:
                return holder, path[len(place) :]
        raise EngineError(f"there is nothing at {path} that holds the past")


def _mask_like(like: torch.Tensor, mask: Mask, new: int, earlier: int) -> torch.Tensor:
    """The mask of `new` queries over all tokens, in the form that was recorded."""
    key = torch.arange(earlier + new, device=like.device)
    seen = mask.visible(key[earlier:, None], key[None, :])
    if like.dtype is not torch.bool:
        hidden = torch.finfo(like.dtype).min
        seen = torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill(
            ~seen, hidden
        )
    return seen.expand(*like.shape[:-2], *seen.shape)


@contextlib.contextmanager
def _eager(part: nn.Module) -> Iterator[None]:
    """The attention implementation the part was recorded with."""
    config = getattr(part, "config", None)
    name = "_attn_implementation_internal"
    if config is None or not hasattr(config, name):
        yield
        return
    before = getattr(config, name)
    setattr(config, name, "eager")
    try:
        yield
    finally:
        setattr(config, name, before)


@contextlib.contextmanager
def _keeping(part: nn.Module, own: Mapping[str, Any]) -> Iterator[None]:
    """`own` as what the part keeps on itself; as before on exit."""
    before = own_attributes(part) if own else {}
    _install(part, own)
    try:
        yield
    finally:
        _install(part, before)


def _install(part: nn.Module, own: Mapping[str, Any]) -> None:
    for name, value in own.items():
        path, _, attribute = name.rpartition(".")
        object.__setattr__(part.get_submodule(path), attribute, value)
