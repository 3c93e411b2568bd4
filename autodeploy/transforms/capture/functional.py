"""A functional graph out of an exported one, without tracing it a second time.

`run_decompositions({})` gives the same: no op writes to its inputs, and none may or may not return
a view (reshape, to, chunk). But it traces the whole graph twice to get there: 20 of 30 s of
capture at 48 layers, where 7 nodes in 100 change. Here those are replaced one by one:

    y = reshape(x, s)    ->   y = view(x, s)
    y = to(x, float32)   ->   y = _to_copy(x, dtype=float32), or x itself
    div_(x, 2)           ->   x' = div(x, 2), read by whatever read x later

A graph with anything else to change, such as a write into a view, is traced again after all.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx.node import map_arg

aten = torch.ops.aten


class _Hard(Exception):
    """Nodes that take a trace to replace."""


def functional(exported: ExportedProgram) -> ExportedProgram:
    """`exported`, changed in place, or what `run_decompositions({})` makes of it."""
    try:
        replace = [change for node in exported.graph.nodes if (change := _change(node))]
    except _Hard:
        return exported.run_decompositions({})
    for change in replace:
        change()
    exported.graph.eliminate_dead_code()
    exported.graph_module.recompile()
    return exported


def _change(node: fx.Node) -> Callable[[], None] | None:
    """What makes a node functional; None if it is.

    Raises:
        _Hard: something more than a replacement would.
    """
    if node.op in ("placeholder", "output"):
        return None
    target = node.target
    if not isinstance(target, OpOverload):
        plain = isinstance(target, type(operator.add)) or target in (torch.sym_max, torch.sym_min)
        if node.op == "call_function" and plain:
            return None
        raise _Hard(node)
    if target._schema.is_mutable:
        return _without_write(node, target)
    undecided = _may_alias(target) or torch.Tag.maybe_aliasing_or_mutating in target.tags
    composite = target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    if not (undecided and composite):
        return None
    if target is aten.reshape.default:
        return _as_view(node)
    if target.overloadpacket is aten.to:
        return _as_copy(node)
    if target is aten.contiguous.default and len(node.args) == 1 and not node.kwargs:
        return _as_contiguous(node)
    if target is aten.chunk.default:
        return _as_split(node)
    if target is aten.dropout.default and node.args[2] is False:
        return partial(_as_clone, node)
    raise _Hard(node)


def _may_alias(target: OpOverload) -> bool:
    return any(result.alias_info is not None for result in target._schema.returns)


def _value(node: Any) -> Any:
    return map_arg(node, lambda n: n.meta["val"])


def _fake(target: OpOverload, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The value of a call, in the mode of the tensors it is given."""
    with args[0].fake_mode, enable_python_dispatcher():
        result: torch.Tensor = target(*args, **kwargs)
    return result


def _insert(
    node: fx.Node, target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
) -> fx.Node:
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args, kwargs)
    new.meta = {**node.meta, "val": value}
    return new


def _replace(
    node: fx.Node, target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
) -> None:
    node.replace_all_uses_with(_insert(node, target, args, kwargs, value))
    node.graph.erase_node(node)


def _as_view(node: fx.Node) -> Callable[[], None]:
    source, result = node.args[0], node.meta["val"]
    if node.kwargs or len(node.args) != 2:
        raise _Hard(node)
    sizes = [
        int(known) if isinstance(known, int) else size
        for size, known in zip(node.args[1], result.shape, strict=True)  # type: ignore[arg-type]
    ]
    try:
        value = _fake(aten.view.default, _value(source), _value(sizes))
    except (RuntimeError, ValueError):
        value = None

    def change() -> None:
        # Looked up now: the argument may have been replaced meanwhile.
        source = node.args[0]
        if value is not None:
            _replace(node, aten.view.default, (source, sizes), {}, value)
            return
        layout = {"memory_format": torch.contiguous_format}
        copied = _fake(aten.clone.default, _value(source), **layout)
        copy = _insert(node, aten.clone.default, (source,), layout, copied)
        viewed = _fake(aten._unsafe_view.default, copied, _value(sizes))
        _replace(node, aten._unsafe_view.default, (copy, sizes), {}, viewed)

    return change


def _as_copy(node: fx.Node) -> Callable[[], None]:
    source, result = _value(node.args[0]), node.meta["val"]
    given = dict(zip([a.name for a in node.target._schema.arguments], node.args, strict=False))  # type: ignore[union-attr]
    given |= node.kwargs
    if given.get("copy") or given.get("memory_format") not in (None, torch.preserve_format):
        raise _Hard(node)
    changed = {
        name: getattr(result, name)
        for name in ("dtype", "device")
        if getattr(source, name) != getattr(result, name)
    }
    if source.layout != result.layout:
        raise _Hard(node)

    def change() -> None:
        if changed:
            _replace(node, aten._to_copy.default, (node.args[0],), changed, result)
        else:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            node.graph.erase_node(node)

    return change


def _as_contiguous(node: fx.Node) -> Callable[[], None]:
    same = _value(node.args[0]).is_contiguous()

    def change() -> None:
        if same:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            node.graph.erase_node(node)
        else:
            layout = {"memory_format": torch.contiguous_format}
            _replace(node, aten.clone.default, (node.args[0],), layout, node.meta["val"])

    return change


def _as_clone(node: fx.Node) -> None:
    _replace(node, aten.clone.default, (node.args[0],), {}, node.meta["val"])


def _as_split(node: fx.Node) -> Callable[[], None]:
    dimension = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    size = node.meta["val"][0].shape[dimension]
    if not isinstance(size, int) or size == 0 or not isinstance(dimension, int):
        raise _Hard(node)

    def change() -> None:
        arguments = (node.args[0], size, dimension)
        _replace(node, aten.split.Tensor, arguments, {}, node.meta["val"])

    return change


def _without_write(node: fx.Node, target: OpOverload) -> Callable[[], None]:
    """`add_(x, y)` as `add(x, y)`, if nothing else can see that `x` was written to."""
    written = [a.name for a in target._schema.arguments if a.alias_info and a.alias_info.is_write]
    source, name = node.args[0] if node.args else None, target.overloadpacket.__name__
    packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
    if (
        target.namespace != "aten"
        or written != [target._schema.arguments[0].name]
        or target._overloadname not in (packet.overloads() if packet else ())
        or not isinstance(source, fx.Node)
        or not _owns_its_memory(source)
    ):
        raise _Hard(node)
    functional_target = getattr(packet, target._overloadname)
    later = set()
    passed = False
    for other in source.graph.nodes:
        if other is node:
            passed = True
        elif other in source.users:
            if passed:
                later.add(other)
            elif not _owns_its_memory(other, written=node):
                raise _Hard(node)
    value = _fake(functional_target, *_value(node.args), **_value(node.kwargs))
    result = node.meta["val"]
    if value.dtype != result.dtype or value.shape != result.shape:
        raise _Hard(node)

    def change() -> None:
        new = _insert(node, functional_target, node.args, dict(node.kwargs), value)
        node.args[0].replace_all_uses_with(new, lambda user: user in later)  # type: ignore[union-attr]
        node.replace_all_uses_with(new)
        node.graph.erase_node(node)

    return change


def _owns_its_memory(node: fx.Node, written: fx.Node | None = None) -> bool:
    """Whether what a node returns shares no memory with what it was given.

    A write before counts as such a node, because it is made one, unless `written` is given: then
    it is another write to what that node writes to.
    """
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return _owns_its_memory(node.args[0], written)
    target = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload):
        return False
    if not target._schema.is_mutable:
        return not _may_alias(target)
    # Another name of what was written to would have to see this write as well.
    source = node.args[0]
    return written is None and isinstance(source, fx.Node) and len(source.users) == 1
