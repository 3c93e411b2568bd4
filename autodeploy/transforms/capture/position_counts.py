"""Positions that a model counts itself are taken from `position_ids` instead.

    p = arange(T); e = embedding(table, p)           e = embedding(table, position_ids[0])
    p = cumsum(ones(1, T))                   become  p = position_ids + 1
    e = table[:T]                                    e = index_select(table, 0, position_ids[0])

For one sequence alone both are the same. For packed sequences only the right side is, wherever
rows meet tokens row by row. Numbers that pick rows *of tokens* are row numbers, not positions,
and stay.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import fx

from ...errors import CaptureError
from ..program import Program, origin
from ..transform import is_call
from .single_sequence import SingleSequence, content_nodes, is_tokens

aten = torch.ops.aten

_COUNTERS = frozenset(
    {aten.arange.default, aten.arange.start, aten.arange.start_step, aten.cumsum.default}
)
_PICKING = ("index", "gather", "scatter", "take", "embedding", "select", "sort", "topk")
_LENGTHS = (5, 9)
_log = logging.getLogger(__name__)


def use_position_ids(program: Program) -> int:
    """Rewrites counted positions, in place; returns how many there were."""
    content = content_nodes(program)
    padding = _padding_tests(program)
    counted = 0
    for node in list(program.graph.nodes):
        rewrite = _counter(program, node, padding) or _table_head(program, node, content)
        if rewrite is None or _picks_tokens(node, content):
            continue
        node.replace_all_uses_with(rewrite())
        counted += 1
        if node in content:
            _log.warning(
                "%s: positions leave out padding tokens; a prompt that contains one is placed as "
                "by the model's own cached decoding, which counts it",
                origin(node),
            )
    if counted:
        program.remove_unused()
    return counted


def _padding_tests(program: Program) -> dict[fx.Node, Any]:
    """Comparisons of token ids with one number, which hold for all tokens of usual text."""
    tests = {}
    for node in program.inputs()["input_ids"].users:
        if is_call(node, aten.ne.Scalar):
            tests[node] = True
    return tests


def _counter(program: Program, node: fx.Node, padding: dict[fx.Node, Any]) -> Any:
    """How to write a node that counts tokens from a constant on; None if it does not."""
    if not is_call(node, *_COUNTERS) or not _one_per_token(program, node.meta["val"]):
        return None
    start = _start(program, node, padding)
    if start is None:
        return None

    def write() -> fx.Node:
        value = node.meta["val"]
        call = _caller(program, node)
        found = call(aten.reshape.default, program.inputs()["position_ids"], _shape(value))
        if start:
            found = call(aten.add.Tensor, found, start)
        if value.dtype is not torch.int64:
            found = call(aten._to_copy.default, found, dtype=value.dtype)
        return found

    return write


def _start(program: Program, node: fx.Node, padding: dict[fx.Node, Any]) -> int | None:
    """The constant from which `node` counts, shown at two lengths."""
    starts = set()
    for length in _LENGTHS:
        given = {n: torch.full((1, length), held) for n, held in padding.items()}
        try:
            found = SingleSequence(program, length).value(node, given).flatten()
        except CaptureError:
            return None  # made of more than the number of tokens
        first = int(found[0])
        if not torch.equal(found.long(), torch.arange(first, first + length, device=found.device)):
            return None
        starts.add(first)
    return starts.pop() if len(starts) == 1 else None


def _table_head(program: Program, node: fx.Node, content: set[fx.Node]) -> Any:
    """How to write a slice of as many first rows of a constant as there are tokens."""
    if not is_call(node, aten.slice.Tensor) or node in content:
        return None
    given: list[Any] = [None, 0, 0, None, 1]
    given[: len(node.args)] = node.args
    source, axis, start, _, step = given
    if not isinstance(source, fx.Node) or not isinstance(axis, int) or not isinstance(start, int):
        return None
    if start < 0 or step != 1 or isinstance(source.meta["val"].shape[axis], torch.SymInt):
        return None
    if not is_tokens(program, node.meta["val"].shape[axis]):
        return None

    def write() -> fx.Node:
        call = _caller(program, node)
        rows = call(aten.reshape.default, program.inputs()["position_ids"], [-1])
        if start:
            rows = call(aten.add.Tensor, rows, start)
        return call(aten.index_select.default, source, axis, rows)

    return write


def _caller(program: Program, node: fx.Node) -> Any:
    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return program.call(target, *args, before=node, like=node, **kwargs)

    return call


def _shape(value: torch.Tensor) -> list[int]:
    return [-1 if isinstance(extent, torch.SymInt) else int(extent) for extent in value.shape]


def _one_per_token(program: Program, value: Any) -> bool:
    if not isinstance(value, torch.Tensor):
        return False
    symbolic = [extent for extent in value.shape if isinstance(extent, torch.SymInt)]
    others = [int(extent) for extent in value.shape if not isinstance(extent, torch.SymInt)]
    return len(symbolic) == 1 and is_tokens(program, symbolic[0]) and set(others) <= {1}


def _picks_tokens(node: fx.Node, content: set[fx.Node]) -> bool:
    """Whether numbers made of `node` choose rows of something made of tokens."""
    waiting, seen = [node], set()
    while waiting:
        current = waiting.pop()
        for user in current.users:
            if user in seen:
                continue
            seen.add(user)
            if user not in content:
                waiting.append(user)
                continue
            name = getattr(getattr(user.target, "_schema", None), "name", "").split("::")[-1]
            sources = user.args[0] if user.args else None
            if name.lstrip("_").startswith(_PICKING) and sources in content:
                return True
    return False
