"""A region as a function: its ops as a graph of its own, and what Inductor makes of them.

Regions that are alike but for the tensors they get share one. Sizes that vary between steps stay
symbols, of a shape environment made for it, so that nothing a compiler finds out about one region
narrows the program around it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .artifacts import cache_directory, environment_key
from .graph_text import target_name
from .inductor import compile_graph, load_graph
from .regions import Region

_log = logging.getLogger("autodeploy")
SETTINGS: Mapping[str, Any] = {"triton.cudagraphs": False, "fx_graph_cache": True}
_HINT = 16
"""The size for which kernels are tuned: decoding, where launches count."""
_ALIGNMENT = 16
"""Bytes; whether an input begins at a multiple decides how it is read."""


class CompiledRegion:
    """Runs a region: tensors and sizes -> tuple of tensors.

    key: of everything that decides what it is. graph: the ops, run one by one until `function`
    is there.
    """

    def __init__(self, key: str, graph: fx.Graph) -> None:
        self.key = key
        self.module = fx.GraphModule(torch.nn.Module(), graph)
        self.__name__ = self.__qualname__ = f"region_{key[:8]}"
        self.function: Callable[..., Any] = self.module.forward
        self.launches = 0
        """Kernels that it runs, once compiled."""

    def __call__(self, *values: Any) -> Any:
        return self.function(*values)

    @property
    def path(self) -> Path:
        """Where it is kept; what Inductor makes of it depends on versions and device."""
        digest = hashlib.sha256(f"{environment_key()}\n{self.key}".encode()).hexdigest()[:32]
        return cache_directory() / "compiled" / f"{digest}.region"

    def load(self) -> bool:
        """Takes what was compiled before; whether there was anything."""
        count = self.path.with_suffix(".launches")
        if not self.path.is_file() or not count.is_file():
            return False
        self.function, self.launches = load_graph(self.path), int(count.read_text())
        return True

    def load_or_warn(self) -> None:
        """Takes what was compiled before; without it the ops run one by one."""
        try:
            loaded = self.load()
            reason = "the compiler's cache is gone"
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a file, the ops run
            loaded, reason = False, " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if not loaded:
            _log.warning("%s runs op by op, which is slower: %s", self.__name__, reason)

    def compile(self, inputs: Sequence[Any], settings: Mapping[str, Any] = SETTINGS) -> None:
        """Compiles it for fake inputs, and keeps the result."""
        from torch._inductor import metrics

        before = metrics.generated_kernel_count
        mark_values(self.module.graph, inputs)
        self.function = compile_graph(self.module, inputs, self.path, settings)
        self.launches = metrics.generated_kernel_count - before
        self.path.with_suffix(".launches").write_text(str(self.launches))


def mark_values(graph: fx.Graph, inputs: Sequence[Any]) -> None:
    """Notes what a compiler needs to find the shape environment of its inputs."""
    values = dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=True))
    mode = next(v.fake_mode for v in inputs if isinstance(v, FakeTensor))
    with mode, enable_python_dispatcher():
        for node in graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
    returned: Any = graph.output_node().args[0]
    for node in returned:
        node.meta["example_value"] = values[node]


def region_graph(region: Region) -> fx.Graph:
    """The region's nodes as a graph that returns a tuple of its outputs."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(region.inputs()):
        copied[node] = graph.placeholder(f"input_{index}")
    for node in region.nodes:
        copied[node] = graph.node_copy(node, lambda n: copied[n])
        copied[node].meta = {}
        copied[node].name = f"node_{len(copied)}"
    graph.output(tuple(copied[node] for node in region.outputs))
    return graph


def region_key(region: Region, graph: fx.Graph) -> str:
    """Equal for regions that are alike: ops, dtypes, strides, and which sizes are one symbol."""
    names: dict[Any, str] = {}
    lines = [_described(node.meta["val"], names) for node in region.inputs()]
    for node in graph.nodes:
        if node.op == "call_function":
            kwargs = sorted(node.kwargs.items())
            lines.append(f"{node.name} = {target_name(node.target)}({node.args}, {kwargs})")
    lines.append(str(list(graph.nodes)[-1].args))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _described(value: Any, names: dict[Any, str]) -> str:
    if not isinstance(value, torch.Tensor):
        return f"size {_renamed(value, names)}"
    shape = [_renamed(size, names) for size in value.shape]
    strides = [_renamed(size, names) for size in value.stride()]
    return f"{value.dtype} {value.device} {shape} {strides} {_offset(value)}"


def _renamed(size: Any, names: dict[Any, str]) -> str:
    if isinstance(size, int):
        return str(size)
    expression = size.node.expr
    for symbol in sorted(expression.free_symbols, key=str):
        names.setdefault(symbol, f"n{len(names)}")
    return str(expression.xreplace({s: sympy.Symbol(n) for s, n in names.items()}))


def _offset(value: torch.Tensor) -> int:
    """Elements before a tensor's first that matter: those that spoil its alignment."""
    offset = value.storage_offset()
    per_block = max(1, _ALIGNMENT // value.element_size())
    return offset % per_block if isinstance(offset, int) else 1


def fresh_values(values: Sequence[Any]) -> list[Any]:
    """The same shapes, dtypes and strides in a shape environment of their own."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    shapes = ShapeEnv(duck_shape=False)
    mode = FakeTensorMode(shape_env=shapes)
    symbols: dict[Any, Any] = {}
    hints: dict[Any, int] = {}

    def fresh(size: Any) -> Any:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        for symbol in sorted(expression.free_symbols - symbols.keys(), key=str):
            index = len(symbols)
            # Hints differ: sizes that are equal by chance must not be taken for one.
            symbols[symbol] = shapes.create_symbol(
                _HINT + index, ConstantSource(f"size_{index}"), DimDynamic.DYNAMIC
            )
            hints[symbols[symbol]] = _HINT + index
        renamed = expression.xreplace(symbols)
        return shapes.create_symintnode(renamed, hint=int(renamed.xreplace(hints)))

    def tensor(value: torch.Tensor) -> torch.Tensor:
        shape, strides = [fresh(s) for s in value.shape], [fresh(s) for s in value.stride()]
        with mode:
            made = torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
            offset = _offset(value)
            return made.as_strided(shape, strides, offset) if offset else made

    return [tensor(v) if isinstance(v, torch.Tensor) else fresh(v) for v in values]
