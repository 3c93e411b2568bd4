"""fuse_shared_experts: an MLP that every token visits becomes one or more of the experts.

    index, weights = route(linear(x, router), k, ...)
    routed = experts(x, index, weights, gate_up, down)
    shared = linear(mul(silu(linear(x, w1)), linear(x, w2)), w3)
    y = add(routed, mul(sigmoid(linear(x, gate)), shared))
becomes
    index, weights = route(linear(x, router ++ gate), k, ..., shared=n, gate=E)
    y = experts(x, index, weights, n parts of (w1, w2) ++ gate_up, n parts of w3 ++ down, shared=n)

where the MLP is n times as wide as an expert: a gated MLP is the sum of its parts. The gate may be
missing, and w1 and w2 may be one linear. Without a gate the choice of any router will do: index and
weights are padded, after whatever scales the weights. Two to four launches less for a few tokens,
and weights are read in one go. The sum is exact, and rounded once where it was rounded three times.
Spared, with a note in the report, are MLPs of other forms. Before `fuse_parallel_linears`, which
would make the router and parts of the MLP one product.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autodeploy.custom_ops.moe import experts, route

from ..gated_mlp import GatedMlp, gated_mlp
from ..program import Fact, Program
from ..transform import Site, Transform, is_call, register_transform
from ..units import Units, joined, units_of
from ..walk import VIEWS, behind_casts, behind_views, operands

aten = torch.ops.aten
_NOTES = "fuse_shared_experts"
# What a kernel of the router writes for a token.
_MOST_CHOICES = 32
# Of another router, pads of one number each.
_MOST_PADDED = 4
# Rows of logits begin at multiples of 16 bytes: kernels are slow at odd addresses.
_ALIGNED = 8


@register_transform("fuse_shared_experts")
@dataclass(frozen=True)
class FuseSharedExperts(Transform):
    """Joins shared experts to the others. `devices`: types of device on which that pays."""

    needs = frozenset({Fact.FUNCTIONAL, Fact.CANONICAL, Fact.LAZY_WEIGHTS})
    devices: tuple[str, ...] = ("cuda",)

    def sites(self, program: Program) -> Iterable[Site]:
        if program.contract.device.type not in self.devices:
            return
        spared = program.options[_NOTES] = Counter[str]()
        for node in program.graph.nodes:
            match = _match(program, node)
            if isinstance(match, str):
                spared[match] += 1
            elif match is not None:
                yield Site((node,))

    def rewrite(self, program: Program, site: Site) -> None:
        (total,) = site.nodes
        match = _match(program, total)
        assert isinstance(match, _Match)
        old, count = match.experts, match.count
        given = experts.bind(old.args, old.kwargs)
        index, weights = _chosen(program, match)
        stacks = {
            name: joined(program, f"{behind_views(given[name]).target}_and_shared", units, old)
            for name, units in (("gate_up", match.gate_up), ("down", match.down))
        }
        routed, width, hidden = given["gate_up"].meta["val"].shape
        shape = [routed + count, width, hidden]
        stacks["gate_up"] = program.call(
            aten.reshape.default, stacks["gate_up"], shape, before=old, like=old
        )
        given |= stacks | {"top_k_index": index, "top_k_weights": weights, "shared": count}
        new = program.call(experts.overload, *given.values(), before=old, like=old)
        old.replace_all_uses_with(new)
        total.replace_all_uses_with(new if match.part is old else match.part)

    def finish(self, program: Program) -> str | None:
        spared: Counter[str] = program.options.pop(_NOTES, Counter())
        return "; ".join(f"{n} spared: {why}" for why, n in spared.items()) or None


@dataclass(frozen=True)
class _Match:
    """Experts, what chose them, and what is to be joined to them."""

    experts: fx.Node
    part: fx.Node
    """The summand that is a view of them."""
    route: fx.Node | None
    """None: another router, whose choice is taken as it is."""
    count: int
    """How many experts the MLP makes."""
    rows: list[Units]
    """Of the router's weight and the gate; none without a gate."""
    gate_up: list[Units]
    down: list[Units]


def _match(program: Program, total: fx.Node) -> _Match | str | None:
    """What to rewrite; why a shared MLP is spared; None if there is none."""
    for part, other in operands(total, aten.add.Tensor):
        old = _experts_in(part)
        mlp = None if old is None else gated_mlp(other)
        if old is None or mlp is None:
            continue
        if any(user is not total and user not in mlp.calls for n in mlp.calls for user in n.users):
            return "something else reads it"
        if behind_views(part) is not old:
            return "the routed sum is scaled"
        if any(len(node.users) != 1 for node in (part, *_views_to(part))):
            return "something else reads the routed sum"
        # Symbols compare by expression: never ask the shape environment, which would guard.
        if len({str(node.meta["val"].shape) for node in (part, other, total)}) > 1:
            return "the sum has another shape"
        return _fitted(program, old, part, mlp)
    return None


def _fitted(program: Program, old: fx.Node, part: fx.Node, mlp: GatedMlp) -> _Match | str:
    given = experts.bind(old.args, old.kwargs)
    stacks = [given["gate_up"], given["down"]]
    inner, hidden = int(stacks[1].meta["val"].shape[2]), int(stacks[1].meta["val"].shape[1])
    plain = given["gated"] and not any(
        given[name]
        for name in ("gate_up_bias", "down_bias", "interleaved", "transposed", "limit", "alpha",
                     "shared", "residual")
    )  # fmt: skip
    if not plain or mlp.activation != given["activation"]:
        return "experts of another form"
    if behind_views(given["x"]) is not mlp.x or given["x"].meta["val"].shape[-1] != hidden:
        return "it reads other rows"
    out, width = (int(size) for size in mlp.last.meta["val"].shape)
    if width % inner:
        return "its width is no multiple of an expert's"
    if out != hidden or any(side.meta["val"].shape[1] != hidden for side in mlp.sides):
        return "weights of another form"
    count, choice = width // inner, _router(given)
    if count > (_MOST_PADDED if choice is None else _MOST_CHOICES - choice.args[1]):  # type: ignore[operator]
        return "it is too wide"
    rows = _rows(program, choice, mlp)
    if mlp.gate is not None and not rows:
        return "its router is of another form"
    tall, flat = (inner, hidden), (hidden, inner)
    halves = [u for n in mlp.sides for units in units_of(program, n, tall) for u in units.each()]
    pairs = [u for pair in zip(halves[:count], halves[count:], strict=False) for u in pair]
    last = units_of(program, mlp.last, flat, beside=count > 1)
    up, down = units_of(program, stacks[0], tall), units_of(program, stacks[1], flat)
    dtypes = {units.dtype for units in (*pairs, *last, *up, *down)}
    if len(pairs) != 2 * count or not (last and up and down) or len(dtypes) > 1:
        return "weights of another form"
    return _Match(old, part, choice, count, rows, [*pairs, *up], [*last, *down])


def _router(given: dict[str, Any]) -> fx.Node | None:
    """The `route` whose choice, and all of it as it is, experts read; None for another router."""
    read = [given["top_k_index"], given["top_k_weights"]]
    if not all(is_call(node, operator.getitem) and len(node.users) == 1 for node in read):
        return None
    choice = read[0].args[0]
    alone = is_call(choice, route.overload) and set(choice.users) == set(read)
    return choice if alone else None


def _rows(program: Program, choice: fx.Node | None, mlp: GatedMlp) -> list[Units]:
    """Rows of the weight behind a router's logits, and the gate of an MLP over the same rows."""
    if mlp.gate is None or choice is None:
        return []
    linear: Any = choice.args[0]
    plain = is_call(linear, aten.linear.default) and len(linear.args) == 2 and not linear.kwargs
    if not plain or len(linear.users) != 1:
        return []
    if behind_views(behind_casts(linear.args[0])) is not mlp.x:
        return []
    row = (int(mlp.gate.meta["val"].shape[1]),)
    parts = [units_of(program, node, row) for node in (behind_casts(linear.args[1]), mlp.gate)]
    alike = len({units.dtype for part in parts for units in part}) == 1
    return [units for part in parts for units in part] if all(parts) and alike else []


def _chosen(program: Program, match: _Match) -> tuple[fx.Node, fx.Node]:
    """Index and weights that name shared experts as well."""
    old, gate = match.route, 0
    if old is None:
        return _padded(program, match)
    given = route.bind(old.args, old.kwargs)
    logits = given["logits"]
    if match.rows:
        x, wide = logits.args
        weight = behind_casts(wide)
        gate = int(weight.meta["val"].shape[0])
        name, padding = f"{behind_views(weight).target}_and_gate", -(gate + 1) % _ALIGNED
        both = joined(program, name, match.rows, logits, padding)
        if wide is not weight:
            both = program.call(wide.target, both, **wide.kwargs, before=logits, like=wide)
        logits = program.call(aten.linear.default, x, both, before=logits, like=logits)
    given |= {"logits": logits, "shared": match.count, "gate": gate}
    chosen = program.call(route.overload, *given.values(), before=old, like=old)
    index, weights = (
        program.call(operator.getitem, chosen, place, before=old, like=old) for place in (0, 1)
    )
    return index, weights


def _padded(program: Program, match: _Match) -> tuple[fx.Node, fx.Node]:
    """Of another router: a sum and pads, which `fuse_rest` makes a part of its last piece."""
    old = match.experts
    given = experts.bind(old.args, old.kwargs)
    place = {"before": old, "like": old}
    pad = aten.constant_pad_nd.default
    index = program.call(aten.add.Tensor, given["top_k_index"], match.count, **place)
    for expert in reversed(range(match.count)):
        index = program.call(pad, index, [1, 0], expert, **place)
    return index, program.call(pad, given["top_k_weights"], [match.count, 0], 1.0, **place)


def _experts_in(part: fx.Node) -> fx.Node | None:
    """The experts that `part` is a view of, or a scaled view."""
    node: Any = behind_views(part)
    if is_call(node, aten.mul.Tensor, aten.div.Tensor):
        node = behind_views(node.args[0])
    return node if is_call(node, experts.overload) else None


def _views_to(part: fx.Node) -> list[fx.Node]:
    """What `part` is a view of, one after the other."""
    found = []
    while is_call(part, *VIEWS):
        part = part.args[0]  # type: ignore[assignment]
        found.append(part)
    return found
