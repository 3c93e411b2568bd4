"""absorb_latent: attention reads the latent of which keys and values are expansions.

    k = cat(W_uk c per head, k_rope for all heads); v = W_uv c per head
    y = autodeploy.attention(q, k, v, cu_q, scale)
becomes
    y = W_uv . autodeploy.latent_attention(cat(q_nope . W_uk, q_rope), cat(c, k_rope), cu_q,
                                           scale, value_width=len(c))
with heads_linear for the products with W_uk and W_uv

q . (W_uk c) = (q . W_uk) c, and a weighted sum of W_uv c is W_uv of the weighted sum: multi-head
latent attention (DeepSeek-V2, 2024) in its absorbed form. The cache then holds c and k_rope: for
DeepSeek-V3 576 numbers a token and layer instead of 40960.

How a model splits heads and puts parts together does not matter: `Columns` follows every number
of k and v to the product it comes from. A site needs that every head's own keys and values are
rows, in even steps, of products without bias of one and the same latent, and that the rest of the
key is the same for all heads. Which weight, which rows and which columns is then known exactly.

Always done where the cache shrinks by more than the arithmetic of attention grows. Both follow
from the shapes: 71 and 3.4 times for DeepSeek-V3. Decode gains what the cache shrinks by. A long
prompt alone would take less arithmetic expanded, and the memory that the latent saves. What this
spares is attention without positions whose "latent" is the whole input of the layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from autodeploy.custom_ops.attention import attention, latent_attention
from autodeploy.custom_ops.linear import heads_linear

from ...errors import TransformError
from ..axis_order import Order, in_order
from ..columns import Columns
from ..program import Fact, Program
from ..transform import Site, Transform, is_call, register_transform

aten = torch.ops.aten


@register_transform("absorb_latent")
@dataclass(frozen=True)
class AbsorbLatent(Transform):
    """Moves the expansion of a latent from keys and values to the query and the output."""

    needs = frozenset({Fact.FUNCTIONAL, Fact.CANONICAL})

    def sites(self, program: Program) -> Iterable[Site]:
        for node in program.graph.nodes:
            if is_call(node, attention.overload):
                found = find_latent(program, node)
                if found is not None and found.pays:
                    yield Site((node,))

    def rewrite(self, program: Program, site: Site) -> None:
        (node,) = site.nodes
        found = find_latent(program, node)
        if found is None:
            raise TransformError(f"{site.where} has no latent")
        given = attention.bind(node.args, node.kwargs)
        out = program.call(
            latent_attention.overload, _query(program, found, node),
            _keys_and_values(program, found, node), given["cu_q"], given["scale"], found.rank,
            given["window"], given["chunk"], given["softcap"], given["sinks"],
            given["alibi_slopes"], before=node, like=node,
        )  # fmt: skip
        weight = _per_head(program, found.values, found.heads, node)
        value = _call(program, node, heads_linear.overload, out, weight)
        node.replace_all_uses_with(value)
        program.graph.erase_node(node)


@dataclass(frozen=True)
class Expansion:
    """Rows of one weight by head: `width` rows from `first` + head · `step` on."""

    product: fx.Node
    """linear(latent [.., T, r], weight [rows, r])"""
    first: int
    step: int
    width: int

    @property
    def weight(self) -> fx.Node:
        return self.product.args[1]  # type: ignore[return-value]

    @property
    def block(self) -> int:
        """Where the rows of all heads, cut in equal blocks, begin."""
        start = self.first - self.first % self.step
        return start if self.first - start + self.width <= self.step else self.first


@dataclass(frozen=True)
class Latent:
    """An attention layer over a latent."""

    latent: fx.Node
    """[.., T, r]"""
    shared: fx.Node | None
    """[.., T, s]: the part of the key that all heads have in common."""
    keys: Expansion
    values: Expansion
    own: slice
    """Columns of a query that meet the expanded part of the key; the others meet the shared."""
    common: slice
    heads: int
    rank: int

    @property
    def pays(self) -> bool:
        """Whether the cache shrinks, and by more than the arithmetic of attention grows."""
        together = self.common.stop - self.common.start
        expanded = self.keys.width + together + self.values.width
        shrinks = self.heads * expanded / (self.rank + together)
        grows = (2 * self.rank + together) / expanded
        return shrinks > max(1.0, grows)


def find_latent(program: Program, node: fx.Node) -> Latent | None:
    """What one attention node reads, if keys and values are expansions of one latent."""
    given = attention.bind(node.args, node.kwargs)
    columns = Columns(program)
    k, v = columns.of(given["k"]), columns.of(given["v"])
    if not given["causal"] or k is None or v is None:
        return None
    heads = len(k)
    same = (k == k[:1]).all(0)
    own, common = _span(~same), _span(same)
    if own is None or common is None or int(given["q"].meta["val"].shape[1]) != heads:
        return None
    keys, values = _expansion(columns, k[:, own]), _expansion(columns, v)
    if keys is None or values is None or not _same_input(columns, keys.product, values.product):
        return None
    if given["q"].meta["val"].dtype is not keys.weight.meta["val"].dtype:
        return None
    shared = _holder(columns, given["k"], k[0, common])
    if shared is None and common.start != common.stop:
        return None
    latent: fx.Node = keys.product.args[0]  # type: ignore[assignment]
    rank = int(latent.meta["val"].shape[-1])
    return Latent(latent, shared, keys, values, own, common, heads, rank)


def _span(chosen: torch.Tensor) -> slice | None:
    """The chosen places as a slice, empty if there are none; None if they are not side by side."""
    places = chosen.nonzero().flatten().tolist()
    if not places:
        return slice(0, 0)
    whole = places[-1] - places[0] + 1 == len(places)
    return slice(places[0], places[-1] + 1) if whole else None


def _expansion(columns: Columns, table: torch.Tensor) -> Expansion | None:
    """The rows that make the columns `table` [heads, width], if they are of one plain product."""
    if table.shape[0] < 2 or table.shape[1] == 0:
        return None
    held = columns.source(table)
    if held is None:
        return None
    product, rows = held
    if not is_call(product, aten.linear.default) or _bias(product) is not None:
        return None
    weight = product.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    first, step = int(rows[0, 0]), int(rows[1, 0] - rows[0, 0])
    heads, width = rows.shape
    even = first + step * torch.arange(heads)[:, None] + torch.arange(width)
    found = Expansion(product, first, step, width)
    total = int(weight.meta["val"].shape[0])
    if step < width or not torch.equal(rows, even) or found.block + heads * step > total:
        return None
    # A row of the weight is a column of the product: its other extents are 1.
    own = columns.of(product)
    return found if own is not None and own.numel() == total else None


def _bias(product: fx.Node) -> object:
    return product.args[2] if len(product.args) > 2 else product.kwargs.get("bias")


def _same_input(columns: Columns, a: fx.Node, b: fx.Node) -> bool:
    left, right = (columns.of(product.args[0]) for product in (a, b))  # type: ignore[arg-type]
    return left is not None and right is not None and torch.equal(left.flatten(), right.flatten())


def _holder(columns: Columns, key: fx.Node, wanted: torch.Tensor) -> fx.Node | None:
    """The tensor [.., T, s] nearest to `key` that holds the columns `wanted` and nothing else."""
    for node in reversed(columns.passed(key)):
        width = node.meta["val"].shape[-1]
        if not isinstance(width, int) or width != len(wanted):
            continue
        held = columns.of(node)
        if held is not None and torch.equal(held.flatten(), wanted):
            return node
    return None


def _call(program: Program, node: fx.Node, target: object, *args: object) -> fx.Node:
    return program.call(target, *args, before=node, like=node)  # type: ignore[arg-type]


def _query(program: Program, found: Latent, node: fx.Node) -> fx.Node:
    """[T, H, r + s]: what the query asks of the latent, and of the shared part of the key."""
    q: fx.Node = attention.bind(node.args, node.kwargs)["q"]
    own = _columns_of(program, q, found.own, node)
    weight = _per_head(program, found.keys, found.heads, node)
    weight = _call(program, node, aten.transpose.int, weight, 1, 2)
    asked = _call(program, node, heads_linear.overload, own, weight)
    if found.shared is None:
        return asked
    common = _columns_of(program, q, found.common, node)
    return _call(program, node, aten.cat.default, [asked, common], -1)


def _columns_of(program: Program, q: fx.Node, part: slice, node: fx.Node) -> fx.Node:
    """[T, H, w]: columns of every head, from before they were put beside others if they were."""
    columns = Columns(program)
    held = columns.of(q)
    if held is None:
        return _cut(program, node, q, 2, part)
    wanted = held[:, part]
    for holder in reversed(columns.passed(q)):
        width, found = holder.meta["val"].shape[-1], columns.of(holder)
        if found is None or found.numel() != wanted.numel() or found.shape[-1] != width:
            continue
        if width == wanted.shape[1] and torch.equal(found.reshape(wanted.shape), wanted):
            return in_order(program, _order(holder, wanted.shape[0]), node)
    return _cut(program, node, q, 2, part)


def _order(holder: fx.Node, heads: int) -> Order:
    """The dimensions of a tensor that has tokens, heads and, last, a head's columns."""
    *extents, _ = holder.meta["val"].shape
    axes = ["t" if isinstance(n, torch.SymInt) else "h" if n == heads else None for n in extents]
    return Order(holder, (*axes, "d"))


def _keys_and_values(program: Program, found: Latent, node: fx.Node) -> fx.Node:
    """[T, 1, r + s]: the latent, then the shared part of the key."""
    latent = _call(program, node, aten.reshape.default, found.latent, [-1, 1, found.rank])
    if found.shared is None:
        return latent
    width = found.common.stop - found.common.start
    shared = _call(program, node, aten.reshape.default, found.shared, [-1, 1, width])
    return _call(program, node, aten.cat.default, [latent, shared], -1)


def _per_head(program: Program, rows: Expansion, heads: int, node: fx.Node) -> fx.Node:
    """[H, width, r]: a view of the weight, which is neither copied nor changed."""
    block, end = rows.block, rows.block + heads * rows.step
    weight = _cut(program, node, rows.weight, 0, slice(block, end))
    rank = int(rows.weight.meta["val"].shape[1])
    weight = _call(program, node, aten.reshape.default, weight, [heads, rows.step, rank])
    start = rows.first - block
    return _cut(program, node, weight, 1, slice(start, start + rows.width))


def _cut(program: Program, node: fx.Node, tensor: fx.Node, axis: int, part: slice) -> fx.Node:
    if (part.start, part.stop) == (0, tensor.meta["val"].shape[axis]):
        return tensor
    return _call(program, node, aten.slice.Tensor, tensor, axis, part.start, part.stop)
