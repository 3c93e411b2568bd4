"""Evaluating a piece of the packed graph as if it held one sequence alone.

What a model adds to its scores, or to its hidden states, besides what it makes of its tokens
depends on positions and weights only. Such a piece has a value for a sequence of n tokens at
positions 0 to n - 1, and from that value it is shown what the piece is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from ...errors import CaptureError
from ..program import Program, origin
from ..transform import is_call

aten = torch.ops.aten

# Their values do not depend on the values of the tensor they are given, only on its shape.
_SHAPE_ONLY = frozenset(
    {aten.sym_size.int, aten.ones_like.default, aten.zeros_like.default, aten.full_like.default,
     aten.empty_like.default, aten.new_ones.default, aten.new_zeros.default,
     aten.new_full.default, aten.new_empty.default}
)  # fmt: skip


def content_nodes(program: Program) -> set[fx.Node]:
    """The nodes whose values depend on which tokens are given."""
    found = {program.inputs()["input_ids"]}
    for node in program.graph.nodes:
        if not is_call(node, *_SHAPE_ONLY) and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def is_tokens(program: Program, extent: Any) -> bool:
    """Whether an extent of a shape is the number of tokens, as an expression."""
    tokens = program.inputs()["input_ids"].meta["val"].shape[1]
    return isinstance(extent, torch.SymInt) and extent.node.expr == tokens.node.expr


class SingleSequence:
    """Values of nodes for one sequence of `tokens` tokens.

    Nodes that depend on token content have none, unless one is given for them.
    """

    def __init__(self, program: Program, tokens: int) -> None:
        self.tokens = tokens
        self._program = program
        self._known: dict[fx.Node, Any] = {}
        inputs = program.inputs()
        self._symbol = inputs["input_ids"].meta["val"].shape[1].node.expr

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The node's shape at this number of tokens."""
        return tuple(self._size(extent) for extent in node.meta["val"].shape)

    def _size(self, extent: Any) -> int:
        if isinstance(extent, torch.SymInt):
            return int(extent.node.expr.xreplace({self._symbol: self.tokens}))
        return int(extent)

    def value(self, node: fx.Node, given: Mapping[fx.Node, Any]) -> Any:
        """The value of `node` where those in `given` have the values stated there.

        Raises:
            CaptureError: it depends on the content of tokens, or on a weight without a value.
        """
        varying = {**given}
        order = _needed(node, lambda n: n in given or n in self._known or self._leaf(n))
        with _disable_current_modes(), torch.no_grad():
            for step in order:
                if step in varying or step in self._known:
                    continue
                value = self._evaluate(step, varying)
                depends = any(n in varying for n in step.all_input_nodes)
                (varying if depends else self._known)[step] = value
        return varying[node] if node in varying else self._known[node]

    def _leaf(self, node: fx.Node) -> bool:
        return node.op != "call_function" or is_call(node, *_SHAPE_ONLY)

    def _evaluate(self, node: fx.Node, varying: Mapping[fx.Node, Any]) -> Any:
        if node.op == "placeholder":
            return self._input(node)
        if node.op == "get_attr":
            value = self._program.read_weight(str(node.target))
            if isinstance(value, FakeTensor) or value.is_meta:
                raise CaptureError(
                    f"{origin(node)}: '{node.target}' has no value yet, and how the model masks "
                    "or places tokens depends on it; capture the model with its weights"
                )
            return value
        if is_call(node, *_SHAPE_ONLY):
            return self._shaped(node)

        def look(n: fx.Node) -> Any:
            return varying[n] if n in varying else self._known[n]

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), look)
        try:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise CaptureError(
                f"{origin(node)}: {node.name} cannot be evaluated for one sequence of "
                f"{self.tokens} tokens: {error}"
            ) from error

    def _shaped(self, node: fx.Node) -> Any:
        """One of _SHAPE_ONLY, of a tensor that may have no value."""
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            return self._size(value)
        fill: Any = 0
        if is_call(node, aten.ones_like.default, aten.new_ones.default):
            fill = 1
        elif is_call(node, aten.full_like.default, aten.new_full.default):
            fill = node.args[1 if node.target is aten.full_like.default else 2]
        if isinstance(fill, fx.Node):
            raise CaptureError(f"{origin(node)}: {node.name} is filled with a computed number")
        device = self._program.contract.device
        return torch.full(self.shape(node), fill, dtype=value.dtype, device=device)

    def _input(self, node: fx.Node) -> torch.Tensor:
        device = self._program.contract.device
        if node.name == "position_ids":
            return torch.arange(self.tokens, device=device)[None]
        if node.name == "cu_q":
            return torch.tensor([0, self.tokens], dtype=torch.int32, device=device)
        raise CaptureError(f"it depends on '{node.name}', not on positions and weights only")


def _needed(node: fx.Node, stop: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """What must be evaluated for `node`, in order; beyond nodes where `stop` holds nothing is."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current in found:
            continue
        found.add(current)
        if not stop(current):
            waiting.extend(current.all_input_nodes)
    return [n for n in node.graph.nodes if n in found]
