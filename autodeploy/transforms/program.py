"""Program: the graph, its weights as lazy slices, its caches and what is known about it.

The graph takes step metadata and caches as inputs (`placeholder`) and weights as attributes
(`get_attr`), and returns logits [N, vocab]. Until `load` the attributes are shapes without
values: a fused weight is a list of slices of checkpoint tensors, read once, when it is needed.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from autodeploy.custom_ops.contract import CacheInput, Contract
from autodeploy.custom_ops.op import op_of

from ..errors import TransformError
from .memory_pages import drop_memory_pages, return_unused_blocks

_RETURN_AFTER = 1 << 30
"""Bytes released before blocks are given back, which waits for the device."""


class Fact(enum.Enum):
    """What a transform may rely on; see `Transform.needs`, `gives` and `breaks`."""

    FUNCTIONAL = "no node writes to its inputs"
    CANONICAL = "no dead, duplicate or identity nodes"
    LAZY_WEIGHTS = "weights are not materialised yet"
    CACHED = "tokens of earlier steps are read from caches"
    LOWERED = "every op node calls a chosen implementation"
    LOADED = "weights are on their device"


@dataclass(frozen=True)
class Weight:
    """A tensor of the graph, made of checkpoint tensors joined along one dimension."""

    pieces: tuple[str, ...]
    """Names in the weight source, in order; one piece is that tensor itself, not a copy."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    dimension: int = 0
    """Along which pieces are joined, each first viewed as `shape` with a size of its own there."""
    order: tuple[tuple[int, int, int], ...] = ()
    """(piece, start, stop) of the parts that are joined instead of whole pieces. A piece of -1
    stands for zeros."""
    beside: tuple[int, ...] = ()
    """Pieces [rows, n * columns] that stand for n of [rows, columns], joined along dimension 0."""

    @property
    def is_copy(self) -> bool:
        """Whether it is a tensor of its own, and no checkpoint tensor as it is."""
        return len(self.pieces) > 1 or bool(self.order)


def parts_of(weight: Weight, pieces: list[torch.Tensor]) -> list[torch.Tensor]:
    """What is joined to make a weight: its pieces, viewed as `Weight` says, or parts of them."""
    before, after = weight.shape[: weight.dimension], weight.shape[weight.dimension + 1 :]
    views = [
        piece.reshape(after[0], -1, *after[1:]).movedim(1, 0)
        if index in weight.beside
        else piece.reshape(*before, -1, *after)
        for index, piece in enumerate(pieces)
    ]
    if not weight.order:
        return views
    return [
        views[0].new_zeros(*before, stop - start, *after)
        if piece < 0
        else views[piece].narrow(weight.dimension, start, stop - start)
        for piece, start, stop in weight.order
    ]


class WeightSource:
    """Tensors by name.

    owned: nobody else needs them, so a tensor that was copied into a joined one is released.
    derived: names that no checkpoint holds, because the model computes them from its config.
    """

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        owned: bool = False,
        derived: frozenset[str] = frozenset(),
    ) -> None:
        self.originals = dict(tensors)
        self.derived = derived
        """Every tensor under its name; those released are empty."""
        self._owned = owned
        self._samples: dict[str, torch.Tensor] = {}
        self._readers = Counter(_place(t) for t in tensors.values())
        self._released_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor that a pass worked out, such as slopes read off a graph."""
        self.originals[name] = tensor
        self.derived |= {name}
        self._readers[_place(tensor)] += 1

    def read(self, weight: Weight) -> torch.Tensor:
        """The weight's value; several pieces, or some in another order, become a new tensor.

        Raises:
            TransformError: a piece is missing.
        """
        missing = [name for name in weight.pieces if name not in self.originals]
        if missing:
            raise TransformError(f"weight '{missing[0]}' is not in the checkpoint")
        pieces = [self.originals[name] for name in weight.pieces]
        if not weight.is_copy:
            return pieces[0]
        return torch.cat(parts_of(weight, pieces), weight.dimension)

    def sample(self, name: str) -> torch.Tensor:
        """Up to 64 elements spread over a tensor, also of one that was released."""
        if name not in self._samples:
            return sample_of(self.originals[name]).clone()
        return self._samples[name]

    def release(self, names: Iterable[str]) -> None:
        """Gives back the memory of tensors that nothing reads any more, if they are owned.

        One that shares its storage with another name stays.
        """
        for name in names if self._owned else ():
            tensor = self.originals[name]
            if self._readers[_place(tensor)] == 1:
                self._samples[name] = self.sample(name)
                self._released_bytes += tensor.nbytes
                drop_memory_pages(tensor)
                if self._released_bytes > _RETURN_AFTER:
                    self._released_bytes = 0
                    return_unused_blocks(tensor.device)


def sample_of(tensor: torch.Tensor) -> torch.Tensor:
    """Up to 64 elements spread evenly over a tensor."""
    flat = tensor.reshape(-1)
    return flat[:: max(1, len(flat) // 63)]


def _place(tensor: torch.Tensor) -> int:
    """Equal for tensors of which one cannot be released without the other."""
    if isinstance(tensor, FakeTensor):
        return tensor.untyped_storage()._cdata
    if tensor.device.type == "cpu":
        # A mapped file is one storage; memory pages are given back for each tensor of it alone.
        return tensor.data_ptr()
    return tensor.untyped_storage().data_ptr()


@dataclass
class Program:
    """A model on its way from capture to a callable; transforms change it in place."""

    graph_module: fx.GraphModule
    weights: dict[str, Weight]
    """By attribute name in the graph module."""
    source: WeightSource
    contract: Contract
    facts: set[Fact]
    fake_mode: FakeTensorMode
    caches: list[CacheInput] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    """Notes a transform keeps between its own sites."""
    module_calls: list[Any] = field(default_factory=list)
    """What module nodes call (`custom_ops/module`): alive as long as the program."""
    function: Callable[..., Any] | None = None
    """What `compile` made of the graph; None: the graph module itself runs."""

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    def inputs(self) -> dict[str, fx.Node]:
        """Graph inputs by name."""
        return {n.name: n for n in self.graph.nodes if n.op == "placeholder"}

    def add_input(self, name: str, value: torch.Tensor) -> fx.Node:
        """A new graph input after the existing ones; `value` is its fake tensor."""
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def add_weight(self, name: str, weight: Weight, before: fx.Node) -> fx.Node:
        """A new weight attribute and the node that reads it."""
        self.weights[name] = weight
        with self.fake_mode:
            value = torch.empty(weight.shape, dtype=weight.dtype, device=self.contract.device)
        self.graph_module.register_buffer(name, value)
        with self.graph.inserting_before(before):
            node = self.graph.get_attr(name)
        node.meta["val"] = value
        return node

    def call(
        self, target: Callable[..., Any], *args: Any, before: fx.Node, like: fx.Node, **kwargs: Any
    ) -> fx.Node:
        """Inserts a call with its shape worked out; `like` lends its origin in the model."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        for key in ("nn_module_stack", "stack_trace"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
        self.infer(node)
        return node

    def infer(self, node: fx.Node) -> None:
        """Works out a call's value from those of its arguments."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        target: Any = node.target
        # Without the Python dispatcher torch 2.11 decomposes some ops, linear among them, in C++,
        # where symbolic sizes have no number.
        with self.fake_mode, enable_python_dispatcher():
            node.meta["val"] = target(*args, **kwargs)

    def remove_unused(self) -> None:
        """Drops dead nodes, and the weights that only they read."""
        self.graph.eliminate_dead_code(is_impure_node=has_effect)
        used = {n.target for n in self.graph.nodes if n.op == "get_attr"}
        for name in [name for name in self.weights if name not in used]:
            del self.weights[name]
            delattr(self.graph_module, name)
        self.graph.lint()
        self.graph_module.recompile()

    def read_weight(self, name: str) -> torch.Tensor:
        """The value of a weight attribute, materialised now if `load` has not run."""
        held = getattr(self.graph_module, name)
        return self.source.read(self.weights[name]) if isinstance(held, FakeTensor) else held

    def weight_bytes(self) -> int:
        """Bytes of all weights, a storage that several share counted once."""
        storages = {}
        for name in self.weights:
            storage = getattr(self.graph_module, name).untyped_storage()
            storages[storage.data_ptr() or id(storage)] = storage.nbytes()
        return sum(storages.values())

    def run(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Interprets the graph as it stands, reading weights as needed: for checks, not speed."""
        if self.function is not None:
            return self.function(*[inputs[name] for name in self.inputs()])
        return Interpreter(self).run(*[inputs[name] for name in self.inputs()])


def has_effect(node: fx.Node) -> bool:
    """Whether a node must stay even if nothing reads it."""
    op = op_of(node.target) if node.op == "call_function" else None
    return node.op in ("placeholder", "output") or bool(op and op.mutates) or "mutates" in node.meta


class Interpreter(fx.Interpreter):
    """Runs a program's graph node by node, reading weights as they are needed."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module)
        self._program = program

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> torch.Tensor:
        return self._program.read_weight(target)


def origin(node: fx.Node) -> str:
    """Where a node comes from in the model: module path and class, as a person reads it."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    path, kind = list(stack.values())[-1]
    return (
        f"{path.removeprefix('model.')} ({getattr(kind, '__name__', str(kind).rsplit('.', 1)[-1])})"
    )
