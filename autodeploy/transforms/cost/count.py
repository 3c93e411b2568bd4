"""cost_of: a program's `Cost`, counted from its nodes.

Three sources: ops that state their own cost (`Op.cost`), matrix products, and weights. A weight is
read whole in every step unless all its readers gather rows of it or are ops that state their own
cost. Counted when the caches are in the graph and before ops are fused or lowered, so every idea
still has one spelling.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from autodeploy.custom_ops.cost import Cost
from autodeploy.custom_ops.op import op_of

from ..transform import is_call

if TYPE_CHECKING:
    from ..program import Program, WeightSource

aten = torch.ops.aten

# Which argument of a product holds its inner dimension last.
_PRODUCTS = {
    aten.linear.default: 0, aten.mm.default: 0, aten.bmm.default: 0, aten.matmul.default: 0,
    aten.addmm.default: 1, aten.baddbmm.default: 1,
}  # fmt: skip
_GATHERS = (aten.embedding.default,)
VIEWS = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.t.default,
    aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.slice.Tensor, aten.select.int, aten.expand.default,
    aten.detach.default, aten.alias.default, aten.split.Tensor, aten.split_with_sizes.default,
    aten.unbind.int, aten.chunk.default, operator.getitem,
)  # fmt: skip
"""Calls that only look at a tensor in another way."""


def cost_of(program: Program) -> Cost | None:
    """What one step of `program` costs; None if parts of it run as code that nobody can count."""
    if program.module_calls:
        return None
    total = Cost(sequence_bytes=_state_bytes(program))
    total += _weights(program)
    for node in program.graph.nodes:
        if node.op == "call_function":
            total += _of_call(program, node)
    return total


def _of_call(program: Program, node: fx.Node) -> Cost:
    op = op_of(node.target)
    if op is not None and op.cost is not None:
        given = op.bind(node.args, node.kwargs)
        return op.cost(fx.node.map_arg(given, lambda n: n.meta["val"]))
    if node.target in _PRODUCTS:
        factor: Any = node.args[_PRODUCTS[node.target]]
        flops = 2 * node.meta["val"].numel() * factor.meta["val"].shape[-1]
        token, logit = _per_token(program, flops), _per_logit(program, flops)
        return Cost(token_flops=token, logit_flops=logit)
    if is_call(node, *_GATHERS):
        row = node.meta["val"]
        return Cost(token_bytes=_per_token(program, row.numel()) * row.dtype.itemsize)
    return Cost()


def _weights(program: Program) -> Cost:
    """Weights that are read whole."""
    sizes: dict[tuple[Any, ...], int] = {}
    for node in program.graph.nodes:
        if node.op != "get_attr" or str(node.target) not in program.weights:
            continue
        if all(_reads_in_part(reader) for reader in _readers(node)):
            continue
        weight = program.weights[str(node.target)]
        for piece in weight.pieces:
            tensor = program.source.originals.get(piece)
            if tensor is not None:
                # By place: a tied weight has several names, and is read once.
                sizes[_place(program.source, piece)] = tensor.numel() * weight.dtype.itemsize
    return Cost(weight_bytes=sum(sizes.values()))


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Nodes that read a weight, seen through views of it."""
    for user in node.users:
        if is_call(user, *VIEWS):
            yield from _readers(user)
        else:
            yield user


def _reads_in_part(reader: fx.Node) -> bool:
    op = op_of(reader.target) if reader.op == "call_function" else None
    return is_call(reader, *_GATHERS) or (op is not None and op.cost is not None)


def _place(source: WeightSource, name: str) -> tuple[Any, ...]:
    tensor = source.originals[name]
    # Not data_ptr(), which is 0 for every tensor on the meta device.
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tuple(tensor.shape)


def _state_bytes(program: Program) -> int:
    """Per-sequence caches are read and written in every step."""
    return sum(2 * c.spec.bytes for c in program.caches if c.spec.per == "sequence")


def _per_token(program: Program, count: Any) -> int:
    return _slope(program.inputs()["input_ids"].meta["val"].shape[1], count)


def _per_logit(program: Program, count: Any) -> int:
    index = program.inputs().get("logit_index")
    return 0 if index is None else _slope(index.meta["val"].shape[0], count)


def _slope(size: Any, count: Any) -> int:
    """How much `count` grows when `size` grows by one and every other size is 0."""
    if not isinstance(size, torch.SymInt) or not isinstance(count, torch.SymInt):
        return 0
    expression, symbol = count.node.expr, size.node.expr
    others = dict.fromkeys(expression.free_symbols - symbol.free_symbols, 0)
    alone = expression.subs(others)
    grown = alone.subs(symbol, 1) - alone.subs(symbol, 0)
    return int(grown) if grown.is_number else 0
