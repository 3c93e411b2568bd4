"""Columns: where every number of a tensor comes from, seen through ops that only move numbers.

Models write one thing in many ways: a key may be a concatenation, or an empty tensor into which
slices are copied; heads may be split before or after a transpose. Such ops are not matched here,
they are *run*, on labels in place of numbers. What comes out says for every position which column
of which source it holds, whatever way it went. A source is a tensor that is computed.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .program import Program
from .transform import is_call

aten = torch.ops.aten

_UNWRITTEN = frozenset({aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default})
_MOVES = frozenset(
    {aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints,
     aten.unflatten.int, aten.transpose.int, aten.permute.default, aten.movedim.int,
     aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.expand.default,
     aten.repeat.default, aten.repeat_interleave.self_int, aten.slice.Tensor, aten.select.int,
     aten.narrow.default, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default,
     aten.unbind.int, aten.cat.default, aten.stack.default, aten.copy.default,
     aten.slice_scatter.default, aten.select_scatter.default, aten.clone.default,
     aten.contiguous.default, aten.alias.default, aten.flip.default}
)  # fmt: skip
_NOWHERE = -1
# Evaluated at two sizes, so that nothing holds at one number of tokens only. Both differ from 1,
# which would broadcast, and from each other's multiples.
_TOKENS = (3, 5)


class Columns:
    """The columns of a program's tensors.

    A tensor of T tokens holds the same columns of each. Two tensors, or parts of them, hold the
    same numbers where they have the same columns.
    """

    def __init__(self, program: Program) -> None:
        self._tokens: Any = program.inputs()["input_ids"].meta["val"].shape[1].node.expr
        self._sources: list[tuple[int, int, fx.Node]] = []
        """(first column, how many, node) of each source met."""
        self._seen: dict[tuple[fx.Node, int], Any] = {}

    def of(self, node: fx.Node) -> torch.Tensor | None:
        """The column behind each position: int64, of the node's shape without its token axis.

        None: it has no token axis, or a position holds another token's number or none.
        """
        try:
            small, large = (self._of(node, tokens) for tokens in _TOKENS)
        except _Opaque:
            return None
        return small if torch.equal(small, large) else None

    def source(self, columns: torch.Tensor) -> tuple[fx.Node, torch.Tensor] | None:
        """The node all `columns` are of, and their places in its own row; None if several."""
        for first, count, node in self._sources:
            if first <= int(columns.min()) and int(columns.max()) < first + count:
                return node, columns - first
        return None

    def passed(self, node: fx.Node) -> list[fx.Node]:
        """The tensors on the way from the sources to `node`, sources included; nearest last."""
        found: dict[fx.Node, None] = {}
        _collect(node, found)
        return list(found)

    def _of(self, node: fx.Node, tokens: int) -> torch.Tensor:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            raise _Opaque
        labels = self._labels(node, tokens).movedim(self._token_axis(value), 0)
        columns, token = labels // tokens, labels % tokens
        own = torch.arange(tokens).reshape(-1, *[1] * (labels.dim() - 1))
        if bool((labels == _NOWHERE).any()) or bool((token != own).any()):
            raise _Opaque
        if not torch.equal(columns, columns[:1].expand_as(columns)):
            raise _Opaque
        return columns[0].clone()

    def _labels(self, node: fx.Node, tokens: int) -> Any:
        """column · tokens + token at every position, or a list of such tensors."""
        key = (node, tokens)
        if key not in self._seen:
            self._seen[key] = self._evaluate(node, tokens)
        return self._seen[key]

    def _evaluate(self, node: fx.Node, tokens: int) -> Any:
        value = node.meta.get("val")
        if isinstance(value, (int, torch.SymInt)):
            return self._size(value, tokens)
        if isinstance(value, torch.Tensor) and is_call(node, *_UNWRITTEN):
            return torch.full(self._shape(value, tokens), _NOWHERE)
        if _moves(node):
            args, kwargs = fx.node.map_arg(
                (node.args, node.kwargs), lambda n: self._labels(n, tokens)
            )
            target: Any = node.target
            return target(*args, **kwargs)
        if not isinstance(value, torch.Tensor):
            raise _Opaque
        shape, axis = self._shape(value, tokens), self._token_axis(value)
        rest = [*shape[:axis], 1, *shape[axis + 1 :]]
        count = torch.Size(rest).numel()
        columns = self._first_column(node, count) + torch.arange(count).reshape(rest)
        steps = [tokens if index == axis else 1 for index in range(len(shape))]
        return columns * tokens + torch.arange(tokens).reshape(steps)

    def _first_column(self, node: fx.Node, count: int) -> int:
        for first, _, known in self._sources:
            if known is node:
                return first
        first = sum(self._sources[-1][:2]) if self._sources else 0
        self._sources.append((first, count, node))
        return first

    def _shape(self, value: torch.Tensor, tokens: int) -> list[int]:
        return [self._size(extent, tokens) for extent in value.shape]

    def _size(self, extent: int | torch.SymInt, tokens: int) -> int:
        if isinstance(extent, int):
            return extent
        size = extent.node.expr.subs(self._tokens, tokens)
        if not size.is_Integer:
            raise _Opaque
        return int(size)

    def _token_axis(self, value: torch.Tensor) -> int:
        axes = [
            index
            for index, extent in enumerate(value.shape)
            if isinstance(extent, torch.SymInt) and extent.node.expr == self._tokens
        ]
        if len(axes) != 1:
            raise _Opaque
        return axes[0]


class _Opaque(Exception):
    """A tensor that is not columns of tokens."""


def _moves(node: fx.Node) -> bool:
    """Whether a call only moves numbers: every input has the dtype of the output."""
    if is_call(node, operator.getitem):
        return isinstance(node.args[0], fx.Node) and _moves(node.args[0])
    if not is_call(node, *_MOVES):
        return False
    value = node.meta["val"]
    out = value[0] if isinstance(value, (list, tuple)) else value
    inputs = (n.meta.get("val") for n in node.all_input_nodes)
    return all(t.dtype is out.dtype for t in inputs if isinstance(t, torch.Tensor))


def _collect(node: fx.Node, found: dict[fx.Node, None]) -> None:
    if node in found:
        return
    if _moves(node):
        for source in node.all_input_nodes:
            _collect(source, found)
    if isinstance(node.meta.get("val"), torch.Tensor):
        found[node] = None
