"""Regions: the cheap ops that no transform recognised, gathered into pieces a compiler can fuse.

A region is a set of nodes that run as one call: nothing outside lies on a way from one of them to
another. Every node gets a level, the number of kernels that must have run before it; nodes of one
level that touch each other make a region. What only one later level reads moves there, so that the
gate of a layer joins the product it gates and not the projection it came from.

    linear -> split -> silu ----------------.        level 1: rope, cat
                  \\-> rope -> cat -> attention -> mul -> linear        level 2: silu, mul
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .program import Program, has_effect

aten = torch.ops.aten

_VIEWS = frozenset(
    {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int,
     aten.permute.default, aten.t.default, aten.unsqueeze.default, aten.squeeze.dim,
     aten.squeeze.dims, aten.squeeze.default, aten.slice.Tensor, aten.select.int,
     aten.narrow.default, aten.expand.default, aten.flatten.using_ints, aten.unflatten.int,
     aten.movedim.int, aten.diagonal.default, aten.alias.default, aten.detach.default}
)  # fmt: skip
"""Of one tensor. A reshape that must copy is work."""
_SPLITS = frozenset(
    {aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default, aten.unbind.int}
)
_WORK = frozenset(
    {aten._to_copy.default, aten.to.dtype, aten.clone.default, aten.contiguous.default,
     aten.cat.default, aten.concatenate.default, aten.stack.default, aten.repeat.default,
     aten.repeat_interleave.self_int,
     aten.constant_pad_nd.default, aten.pad.default, aten.roll.default, aten.flip.default,
     aten.full.default, aten.zeros.default, aten.ones.default, aten.full_like.default,
     aten.zeros_like.default, aten.ones_like.default, aten.arange.default, aten.arange.start,
     aten.gather.default, aten.scatter.value, aten.scatter.src, aten.triu.default,
     aten.tril.default, aten.softmax.int, aten._softmax.default, aten.log_softmax.int,
     aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.var.dim,
     aten.var.correction, aten.linalg_vector_norm.default, aten.any.dim, aten.all.dim,
     aten.layer_norm.default}
)  # fmt: skip
_REDUCES = frozenset(
    {aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.sum.dim_IntList,
     aten.mean.dim, aten.amax.default, aten.amin.default, aten.var.dim, aten.var.correction,
     aten.linalg_vector_norm.default, aten.any.dim, aten.all.dim}
)  # fmt: skip
"""Over the dimensions of `dim`: the second argument, of a norm the third."""
_LAUNCHES: dict[Any, int] = {aten.scatter.value: 2, aten.scatter.src: 2}
"""Where it is not one."""


@dataclass(frozen=True)
class Region:
    """Nodes that can run as one call."""

    nodes: tuple[fx.Node, ...]
    """Each after those it reads, in an order that is the same for regions that are alike."""
    views: frozenset[fx.Node]
    """Those among them that launch nothing. Others may read them too, if they are of an input."""
    outputs: tuple[fx.Node, ...]
    """Whose values, or views of them, are read outside. None of them is a view."""
    launches: int
    """Kernels that the nodes are when each runs alone."""

    def inputs(self) -> tuple[fx.Node, ...]:
        """Tensors and sizes from outside, in the order of their first use."""
        inside = set(self.nodes)
        sources = (s for node in self.nodes for s in node.all_input_nodes)
        return tuple(dict.fromkeys(s for s in sources if s not in inside))


def find_regions(program: Program) -> list[Region]:
    """All regions of a graph with more than one launch, in no order that matters.

    Values must be up to date (`refresh_values`): strides decide whether a reshape copies.
    """
    kinds = _kinds(program)
    levels = _levels(program.graph, kinds)
    regions = [_region(nodes, kinds) for nodes in _connected(program.graph, kinds, levels)]
    return [region for region in regions if region.launches > 1]


def refresh_values(program: Program) -> None:
    """Works out the value of every call anew; earlier steps may have changed strides above it."""
    for node in program.graph.nodes:
        if node.op == "call_function" and _tensors(node.meta.get("val")) and not has_effect(node):
            program.infer(node)


def sort_nodes(graph: fx.Graph) -> None:
    """Puts nodes after what they read, close to where they were; effects stay in order."""
    nodes = list(graph.nodes)
    place = {node: index for index, node in enumerate(nodes)}
    after: dict[fx.Node, list[fx.Node]] = {node: list(node.users) for node in nodes}
    effects = [n for n in nodes if n.op == "call_function" and has_effect(n)]
    for first, second in zip(effects, effects[1:], strict=False):
        after[first].append(second)
    waits = dict.fromkeys(nodes, 0)
    for node in nodes:
        for later in after[node]:
            waits[later] += 1
    ready = [place[node] for node in nodes if waits[node] == 0]
    heapq.heapify(ready)
    last = nodes[-1]
    while ready:
        node = nodes[heapq.heappop(ready)]
        if node is not last:
            last.prepend(node)
        for later in after[node]:
            waits[later] -= 1
            if waits[later] == 0:
                heapq.heappush(ready, place[later])


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if isinstance(v, torch.Tensor)]


def _kinds(program: Program) -> dict[fx.Node, str]:
    """Of every node: "source", "size", "view", "work", or "kernel", which no region can hold."""
    device = program.contract.device
    # Caches are written at other times than the graph's edges say: what reads one stays.
    written = {n for node in program.graph.nodes for n in written_by(node)}
    kinds: dict[fx.Node, str] = {}
    for node in program.graph.nodes:
        sources = node.all_input_nodes
        if node.op != "call_function":
            kinds[node] = "source"
        elif not _tensors(node.meta.get("val")):
            kinds[node] = "kernel" if any(_is_made(n) for n in sources) else "size"
        elif written.intersection(sources) or not _fusable(node, device):
            kinds[node] = "kernel"
            if written.intersection(sources) and _is_view(node):
                written.add(node)
        elif node.target is operator.getitem and kinds[sources[0]] == "kernel":
            kinds[node] = "kernel"
        else:
            kinds[node] = "view" if _is_view(node) else "work"
    return kinds


def _is_made(node: fx.Node) -> bool:
    """Whether a node is a tensor that the graph works out."""
    return node.op == "call_function" and bool(_tensors(node.meta.get("val")))


def written_by(node: fx.Node) -> Iterator[fx.Node]:
    """Nodes whose memory a call writes to, by its schema."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            yield from (v for v in (value if isinstance(value, (list, tuple)) else [value])
                        if isinstance(v, fx.Node))  # fmt: skip


def _fusable(node: fx.Node, device: torch.device) -> bool:
    """Whether a compiler makes one pass of this op and its neighbours."""
    target: Any = node.target
    values = _tensors(node.meta["val"])
    for source in node.all_input_nodes:
        values = values + _tensors(source.meta.get("val"))
    if any(v.device != device or v.is_complex() or v.dtype is torch.float64 for v in values):
        return False
    if target is operator.getitem:
        return _is_view(node)
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    if target in _REDUCES:
        return _reduces_known_sizes(node)
    return torch.Tag.pointwise in target.tags or target in _VIEWS | _SPLITS | _WORK


def _reduces_known_sizes(node: fx.Node) -> bool:
    """Whether each element of a reduction is of one token: the extent does not vary."""
    at = 2 if node.target is aten.linalg_vector_norm.default else 1
    dims = node.kwargs.get("dim", node.args[at] if len(node.args) > at else None)
    shape = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    if dims is None or dims == []:
        return False
    return all(type(shape[d]) is int for d in (dims if isinstance(dims, (list, tuple)) else [dims]))


def _is_view(node: fx.Node) -> bool:
    """Whether a call's tensors share the memory of its input: no kernel runs."""
    if node.target in _SPLITS:
        return True
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and _is_view(node.args[0])
    if node.target not in _VIEWS or not isinstance(node.args[0], fx.Node):
        return False
    source, value = node.args[0].meta["val"], node.meta["val"]
    return bool(source.untyped_storage()._cdata == value.untyped_storage()._cdata)


def _levels(graph: fx.Graph, kinds: dict[fx.Node, str]) -> dict[fx.Node, int]:
    """Kernels before each node, on the longest way to it; late where that joins its readers."""
    levels: dict[fx.Node, int] = {}
    effect = 0
    for node in graph.nodes:
        # A part of what a kernel returns is there when the kernel has run.
        step = int(node.target is not operator.getitem)
        sources = node.all_input_nodes
        level = max((levels[n] + step * (kinds[n] == "kernel") for n in sources), default=0)
        if node.op == "call_function" and has_effect(node):
            # What writes to caches keeps its order.
            level = effect = max(level, effect)
        levels[node] = level
    for node in reversed(graph.nodes):
        later = {levels[user] for user in node.users}
        fusable = all(kinds[user] in ("view", "work") for user in node.users)
        # What several layers read stays: it would make the region of the first unlike the others.
        if kinds[node] in ("view", "work") and fusable and len(later) == 1:
            levels[node] = later.pop()
    return levels


def _connected(
    graph: fx.Graph, kinds: dict[fx.Node, str], levels: dict[fx.Node, int]
) -> list[list[fx.Node]]:
    """Nodes of equal level that read one another, or the same result of a kernel."""
    parent: dict[Any, Any] = {}

    def root(key: Any) -> Any:
        while parent.setdefault(key, key) is not key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    members = [n for n in graph.nodes if kinds[n] in ("view", "work")]
    for node in members:
        for source in node.all_input_nodes:
            inside = kinds[source] in ("view", "work") and levels[source] == levels[node]
            if inside:
                parent[root(source)] = root(node)
            elif source.op != "get_attr" and kinds[source] != "size":
                key = (source, levels[node])
                parent[root(parent.setdefault(key, key))] = root(node)
    found: dict[Any, list[fx.Node]] = {}
    for node in members:
        found.setdefault(root(node), []).append(node)
    return list(found.values())


def _region(members: list[fx.Node], kinds: dict[fx.Node, str]) -> Region:
    """A region of work, with the views that lead to it, whosever they are: they cost nothing."""
    inside = set(members)
    work = [n for n in members if kinds[n] == "work"]
    outputs = tuple(n for n in work if _read_outside(n, inside, kinds))
    nodes: dict[fx.Node, None] = {}

    def add(node: fx.Node) -> None:
        within = kinds[node] == "view" or (kinds[node] == "work" and node in inside)
        if within and node not in nodes:
            for source in node.all_input_nodes:
                add(source)
            nodes[node] = None

    for node in outputs:
        add(node)
    launches = sum(_LAUNCHES.get(n.target, 1) for n in work)
    return Region(tuple(nodes), frozenset(nodes) - set(work), outputs, launches)


def _read_outside(node: fx.Node, inside: set[fx.Node], kinds: dict[fx.Node, str]) -> bool:
    return any(
        user not in inside or (kinds[user] == "view" and _read_outside(user, inside, kinds))
        for user in node.users
    )
