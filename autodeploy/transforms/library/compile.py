"""compile: the finished graph is handed to Inductor, or left as plain Python calls.

Recognised kernels are often all a known model needs, so `off` is the default. With `inductor`,
everything no transform recognised is fused, and the artifact is kept on disk under a key made of
the graph's text, the compiler's sources, versions and device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...errors import RecipeError
from ..artifacts import artifact_path
from ..inductor import compile_graph, load_graph
from ..program import Fact, Program
from ..transform import Site, Transform, register_transform

BACKENDS = ("off", "inductor")


@register_transform("compile")
@dataclass(frozen=True)
class Compile(Transform):
    """Chooses how the graph is executed. `backend`: off or inductor."""

    needs = frozenset({Fact.LOADED, Fact.LOWERED})
    backend: str = "off"

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise RecipeError(
                f"compile: backend must be one of {', '.join(BACKENDS)}, not '{self.backend}'"
            )

    def sites(self, program: Program) -> Iterable[Site]:
        return ()

    def finish(self, program: Program) -> None:
        if self.backend == "inductor":
            program.function = compile_with_inductor(program)


def compile_with_inductor(program: Program) -> Callable[..., Any]:
    """The program as one Inductor artifact, from disk if it was compiled before."""
    module, names = lift_weights(program)
    path = artifact_path(program, "inductor")
    weights = [getattr(program.graph_module, name) for name in names]
    if path.is_file():
        artifact = load_graph(path)
    else:
        inputs = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
        artifact = compile_graph(module, inputs, path)

    def run(*inputs: torch.Tensor) -> Any:
        result = artifact(*inputs, *weights)
        return result[0] if isinstance(result, (tuple, list)) else result

    return run


def lift_weights(program: Program) -> tuple[fx.GraphModule, list[str]]:
    """A copy of the graph with weights as inputs after the others, and their names in order.

    Inductor specialises on attributes; inputs with fake values keep their shapes symbolic.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    nodes = list(program.graph.nodes)
    for node in nodes:
        if node.op == "placeholder":
            copied[node] = graph.node_copy(node)
    names: list[str] = []
    readers: dict[str, fx.Node] = {}
    for node in nodes:
        if node.op != "get_attr":
            continue
        name = str(node.target)
        if name not in readers:
            readers[name] = graph.placeholder(name)
            readers[name].meta["val"] = node.meta["val"]
            names.append(name)
        copied[node] = readers[name]
    for node in nodes:
        if node.op == "output":
            graph.output((copied[node.args[0]],))
        elif node.op == "call_function":
            copied[node] = graph.node_copy(node, lambda n: copied[n])
    return fx.GraphModule(torch.nn.Module(), graph), names
