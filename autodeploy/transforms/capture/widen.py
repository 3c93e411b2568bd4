"""From a graph that holds up to the model's longest sequence to one for any number of tokens.

A model that cuts a table of constants to the length of its input exports only for lengths within
the table. Once its masks and positions are rewritten, nothing of that is left: each token's row
depends on its own position, which stays within the table, and a packed batch may be longer. That
nothing is left is shown by working out every shape again, without the bound and without a guard.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    StrictMinMaxConstraint,
)
from torch.utils._sympy.value_ranges import ValueRanges

from ...errors import CaptureError
from ..program import Program, origin

_LOWEST = {"input_ids": 1, "cu_q": 2, "logit_index": 1}


def widen(program: Program, limit: int) -> None:
    """Gives every node a shape that holds for 1 to `limit` tokens, in place.

    Raises:
        CaptureError: a node's shape holds for some numbers of tokens only.
    """
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    program.fake_mode = mode
    for node in program.graph.nodes:
        if node.op == "placeholder":
            node.meta["val"] = _input(program, node, limit)
        elif node.op == "get_attr":
            node.meta["val"] = _attribute(program, mode, str(node.target))
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            with mode, enable_python_dispatcher():
                node.meta["val"] = node.target(*args, **kwargs)
            if shapes.guards:
                raise CaptureError(
                    f"{origin(node)}: {node.name} holds only for some lengths: "
                    f"{shapes.guards[0].expr}"
                )


def _input(program: Program, node: fx.Node, limit: int) -> torch.Tensor:
    old = node.meta["val"]
    if node.name == "position_ids":
        tokens = program.inputs()["input_ids"].meta["val"].shape[1]
        with program.fake_mode:
            return torch.empty((1, tokens), dtype=old.dtype, device=old.device)
    dynamic = [isinstance(extent, torch.SymInt) for extent in old.shape]
    bounds = StrictMinMaxConstraint(
        vr=ValueRanges(lower=_LOWEST[node.name], upper=limit), warn_only=False
    )
    sizes = [int(e.node.hint) if isinstance(e, torch.SymInt) else e for e in old.shape]
    sample = torch.empty(sizes, dtype=old.dtype, device=old.device)
    context: Any = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.DYNAMIC if d else DimDynamic.STATIC for d in dynamic],
        constraint_sizes=[bounds if d else None for d in dynamic],
    )
    return program.fake_mode.from_tensor(
        sample, source=ConstantSource(node.name), symbolic_context=context
    )


def _attribute(program: Program, mode: FakeTensorMode, name: str) -> Any:
    held = getattr(program.graph_module, name)
    with mode:
        value = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device=held.device)
    program.graph_module.register_buffer(name, value)
    return value
