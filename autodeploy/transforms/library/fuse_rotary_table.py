"""fuse_rotary_table: the cosines and sines of a step's positions become one op.

    angles = transpose(matmul(inv_freq[None, :, None].float(), position_ids[:, None].float()))
    both = cat((angles, angles), -1)
    cos = (cos(both) * scaling).to(dtype); sin = (sin(both) * scaling).to(dtype)
becomes
    cos, sin = rotary_table(position_ids, inv_freq, scaling, 'halves', dtype)

Every frequency may also be repeated in place, or stand once, and the table may be the parts of
complex numbers: polar(1, angles). What follows another way, such as
frequencies that depend on how long a sequence is, stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autodeploy.custom_ops.rope import rotary_table

from ...errors import TransformError
from ..program import Fact, Program
from ..transform import Site, Transform, is_call, register_transform

aten = torch.ops.aten


@register_transform("fuse_rotary_table")
@dataclass(frozen=True)
class FuseRotaryTable(Transform):
    """Joins what makes a rotary table. `devices`: types of device with a kernel for it."""

    needs = frozenset({Fact.CANONICAL})
    devices: tuple[str, ...] = ("cuda",)

    def sites(self, program: Program) -> Iterable[Site]:
        if program.contract.device.type not in self.devices:
            return
        for node in program.graph.nodes:
            if is_call(node, aten.matmul.default) and find_table(node) is not None:
                yield Site((node,))

    def rewrite(self, program: Program, site: Site) -> None:
        (product,) = site.nodes
        found = find_table(product)
        if found is None:
            raise TransformError(f"{site.where} is no rotary table")
        table = program.call(
            rotary_table.overload, found.positions, found.frequencies, found.scaling, found.layout,
            found.dtype, before=product, like=product,
        )  # fmt: skip
        for index, node in enumerate((found.cos, found.sin)):
            part = program.call(operator.getitem, table, index, before=product, like=product)
            node.replace_all_uses_with(part)


@dataclass(frozen=True)
class Table:
    """A rotary table: what it is made of, and the nodes that are its cosines and sines."""

    positions: fx.Node
    frequencies: fx.Node
    layout: str
    scaling: float
    dtype: torch.dtype
    cos: fx.Node
    sin: fx.Node


def find_table(product: fx.Node) -> Table | None:
    """The table that comes of this product of frequencies and positions, if it is nothing else."""
    frequencies, positions = (_source(node) for node in product.args)
    if frequencies is None or positions is None:
        return None
    f, p = frequencies.meta["val"], positions.meta["val"]
    if f.dim() != 1 or p.dim() != 2 or not f.dtype.is_floating_point or p.dtype.is_floating_point:
        return None
    if not _has_shape(product.args[0], (1, f.shape[0], 1)):
        return None
    if not _has_shape(product.args[1], (1, 1, p.shape[1])):
        return None
    turned = _only_reader(product)
    if turned is None or not is_call(turned, aten.transpose.int):
        return None
    if {int(d) % 3 for d in turned.args[1:]} != {1, 2}:  # type: ignore[arg-type]
        return None
    layout, angles = _layout(turned)
    ends = _complex_ends(angles) or _ends(angles)
    if ends is None or ends[0][1:] != ends[1][1:]:
        return None
    (cos, scaling, dtype), (sin, *_) = ends
    if layout == "once" and (twice := [_repeated(cos), _repeated(sin)]) != [None, None]:
        if None in twice:
            return None
        layout, (cos, sin) = "halves", twice  # type: ignore[assignment]
    return Table(positions, frequencies, layout, scaling, dtype, cos, sin)


def _source(operand: Any) -> fx.Node | None:
    """What an operand is before it gets dimensions of one element and becomes float32."""
    if not isinstance(operand, fx.Node) or operand.meta["val"].dtype is not torch.float32:
        return None
    node: Any = operand
    while is_call(node, aten.unsqueeze.default) or _casts(node, torch.float32):
        node = node.args[0]
    return node


def _casts(node: Any, *dtypes: torch.dtype) -> bool:
    """Whether a node changes the dtype to one of `dtypes`, any if there are none, and no more."""
    if not is_call(node, aten._to_copy.default) or not set(node.kwargs) <= {"dtype", "device"}:
        return False
    value, source = node.meta["val"], node.args[0].meta["val"]
    # Wider numbers than the op's float32 would lose digits on the way.
    narrow = source.dtype is not torch.float64 and value.device == source.device
    return narrow and (not dtypes or value.dtype in dtypes)


def _has_shape(node: Any, shape: tuple[Any, ...]) -> bool:
    # Symbols compare by expression: never ask the shape environment, which would guard.
    return [str(size) for size in node.meta["val"].shape] == [str(size) for size in shape]


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _layout(angles: fx.Node) -> tuple[str, fx.Node]:
    """Where a row of the table has its frequencies, and the node whose cosines are taken."""
    reader = _only_reader(angles)
    if reader is not None and is_call(reader, aten.cat.default):
        dimension = reader.args[1] if len(reader.args) > 1 else 0
        if list(reader.args[0]) == [angles, angles] and dimension in (-1, 2):  # type: ignore[arg-type]
            return "halves", reader
    if reader is not None and is_call(reader, aten.repeat_interleave.self_int):
        twice = tuple(reader.args[1:]) in ((2, -1), (2, 2)) and not reader.kwargs
        return ("pairs", reader) if twice else ("once", angles)
    return "once", angles


_End = tuple[fx.Node, float, torch.dtype]


def _ends(angles: fx.Node) -> list[_End] | None:
    """What angles become cosines and sines by: see `_scaled`."""
    readers = {node.target: node for node in angles.users}
    if len(angles.users) != 2 or set(readers) != {aten.cos.default, aten.sin.default}:
        return None
    return [_scaled(readers[target]) for target in (aten.cos.default, aten.sin.default)]


def _complex_ends(angles: fx.Node) -> list[_End] | None:
    """The same where cosines and sines are parts of complex numbers of length one."""
    polar = next((n for n in angles.users if is_call(n, aten.polar.default)), None)
    if polar is None or polar.args[1] is not angles:
        return None
    length: Any = polar.args[0]
    if not is_call(length, aten.ones_like.default) or set(angles.users) != {polar, length}:
        return None
    if length.args[0] is not angles or len(length.users) != 1 or "dtype" in length.kwargs:
        return None
    node, scaling, _ = _scaled(polar)
    parts = _only_reader(node)
    if parts is None or not is_call(parts, aten.view_as_real.default) or len(parts.users) != 2:
        return None
    places = {
        int(n.args[2]): n  # type: ignore[arg-type]
        for n in parts.users
        if is_call(n, aten.select.int) and n.args[1] in (-1, 3)
    }
    if set(places) != {0, 1}:
        return None
    return [(places[index], scaling, torch.float32) for index in (0, 1)]


def _repeated(part: fx.Node) -> fx.Node | None:
    """Where a table is read only to be put beside itself, that."""
    reader = _only_reader(part)
    if reader is None or not is_call(reader, aten.cat.default):
        return None
    dimension = reader.args[1] if len(reader.args) > 1 else 0
    return reader if list(reader.args[0]) == [part, part] and dimension in (-1, 2) else None  # type: ignore[arg-type]


def _scaled(node: fx.Node) -> _End:
    """The last node of a product with a number and a cast after `node`, the number, the dtype."""
    scaling = 1.0
    reader = _only_reader(node)
    if reader is not None and is_call(reader, aten.mul.Tensor):
        factor = reader.args[1]
        if isinstance(factor, (int, float)):
            node, scaling = reader, float(factor)
            reader = _only_reader(node)
    if reader is not None and _casts(reader):
        node = reader
    return node, scaling, node.meta["val"].dtype
