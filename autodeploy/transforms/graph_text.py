"""A program as text a person reads: one line a node, with its shape and where it comes from."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autodeploy.custom_ops.op import op_of

from .program import Program, origin


def graph_text(program: Program) -> str:
    """The whole graph; two dumps of neighbouring steps compare line by line with any diff."""
    lines = [f"# facts: {', '.join(sorted(fact.name for fact in program.facts))}"]
    where = None
    for node in program.graph.nodes:
        place = origin(node) if node.meta.get("nn_module_stack") else where
        if place != where and node.op == "call_function":
            lines += ["", f"# {place}"]
            where = place
        lines.append(_line(program, node))
    return "\n".join(lines) + "\n"


def _line(program: Program, node: fx.Node) -> str:
    shape = _shape(node.meta.get("val"))
    if node.op == "placeholder":
        return f"{node.name}: {shape} = input"
    if node.op == "get_attr":
        weight = program.weights.get(str(node.target))
        pieces = " + ".join(weight.pieces) if weight else node.target
        return f"{node.name}: {shape} = weight {pieces}"
    if node.op == "output":
        return f"return {node.args[0]}"
    arguments = [_value(a) for a in node.args]
    arguments += [f"{k}={_value(v)}" for k, v in node.kwargs.items()]
    return f"{node.name}: {shape} = {target_name(node.target)}({', '.join(arguments)})"


def target_name(target: Any) -> str:
    """A readable name of what a node calls: `autodeploy.rope`, `aten.mul.Tensor`."""
    op = op_of(target)
    if op is not None:
        return f"autodeploy.{op.name}"
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    return str(value)


def _shape(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_shape(v) for v in value) + ")"
    return type(value).__name__
