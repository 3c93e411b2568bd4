"""fuse_conv_delta: what is between the projections of a gated delta layer becomes one op.

    q, k, v = split(cached_causal_conv1d(x, w, .., "silu"))
    g = -exp(a_log) * softplus(a + dt_bias); beta = sigmoid(b)
    y = cached_gated_delta_rule(repeat(q), repeat(k), v, g, beta, ..)
    y = weight * rms(y) * silu(z)
becomes
    y = conv_delta_rule(x, w, .., a, b, a_log, dt_bias, z, weight, ..)

Which columns of the convolution become queries, keys and values is worked out, not matched (see
`Columns`); queries and keys that are repeated for several heads are read where they are instead.
Gates and the norm of another form stay apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autodeploy.custom_ops.state import (
    cached_causal_conv1d,
    cached_gated_delta_rule,
    conv_delta_rule,
)

from ..columns import Columns
from ..gated_norm import GatedNorm, find_gated_norm
from ..program import Fact, Program
from ..transform import Site, Transform, is_call, register_transform
from ..walk import (
    behind_casts,
    behind_views,
    drop_calls,
    leads_only_to,
    negated_exponent,
    operands,
)

aten = torch.ops.aten


@register_transform("fuse_conv_delta")
@dataclass(frozen=True)
class FuseConvDelta(Transform):
    """Joins a convolution to the delta rule it feeds. `devices`: types with a kernel for it."""

    needs = frozenset({Fact.CACHED})
    devices: tuple[str, ...] = ("cuda",)

    def sites(self, program: Program) -> Iterable[Site]:
        if program.contract.device.type not in self.devices:
            return
        columns = Columns(program)
        for node in program.graph.nodes:
            if is_call(node, cached_gated_delta_rule.overload):
                conv = find_convolution(node, columns)
                if conv is not None:
                    yield Site((node, conv))

    def rewrite(self, program: Program, site: Site) -> None:
        node, conv = site.nodes
        given = cached_gated_delta_rule.bind(node.args, node.kwargs)
        given |= {f"conv_{name}": value for name, value in _bound(conv).items()}
        norm = find_gated_norm(node)
        last = node if norm is None else norm.last
        made = _gates(given["g"], given["beta"]) or {"g": given["g"], "beta": given["beta"]}
        options = {
            "a_log": None, "dt_bias": None, "gate": None, "norm_weight": None, "eps": 0.0,
        } | given | made | {"x": given["conv_x"], "activation": given["conv_activation"],
                            "conv_state": given["conv_conv_state"]}  # fmt: skip
        heads = node.meta["val"].shape[1]
        for name in ("g", "beta"):
            options[name] = program.call(
                aten.reshape.default, options[name], [-1, heads], before=last, like=node
            )
        if norm is not None:
            options |= _normed(program, norm, node)
        fused = program.call(
            conv_delta_rule.overload, *(options[name] for name in conv_delta_rule.arguments),
            before=last, like=node,
        )  # fmt: skip
        if norm is None:
            node.replace_all_uses_with(fused)
        else:
            _replace_view(program, last, fused)
        drop_calls(program.graph, [conv, node])


def find_convolution(delta: fx.Node, columns: Columns) -> fx.Node | None:
    """The convolution whose output is the queries, keys and values of a delta rule, in order.

    None if there is none, or if something else reads it.
    """
    given = cached_gated_delta_rule.bind(delta.args, delta.kwargs)
    found = [columns.of(given[name]) for name in ("q", "k", "v")]
    if any(part is None for part in found):
        return None
    q, k, v = (part for part in found if part is not None)
    source = columns.source(torch.cat([part.flatten() for part in (q, k, v)]))
    if source is None or not is_call(source[0], cached_causal_conv1d.overload):
        return None
    conv, places = source
    width = int(conv.meta["val"].shape[1]) - v.numel()
    keys = q.shape[-1]
    if width <= 0 or width % (2 * keys) or q.shape != k.shape or q.shape[0] % (width // 2 // keys):
        return None
    groups = width // 2 // keys
    heads = torch.arange(groups * keys).view(groups, keys)
    heads = heads.repeat_interleave(q.shape[0] // groups, 0).flatten()
    expected = torch.cat([heads, heads + width // 2, width + torch.arange(v.numel())])
    if not torch.equal(places, expected) or not leads_only_to(conv, delta):
        return None
    same = ("cu_q", "kv_len", "state_slot")
    return conv if all(_bound(conv)[name] is given[name] for name in same) else None


def _bound(conv: fx.Node) -> dict[str, Any]:
    return cached_causal_conv1d.bind(conv.args, conv.kwargs)


def _gates(g: fx.Node, beta: fx.Node) -> dict[str, fx.Node] | None:
    """What decays and strengths are made of, if it is what `delta_gates` makes them of."""
    strength: Any = behind_views(beta)
    product: Any = behind_views(g)
    if not is_call(strength, aten.sigmoid.default) or not is_call(product, aten.mul.Tensor):
        return None
    for rate, step in (product.args[:2], product.args[1::-1]):
        a_log = negated_exponent(rate)
        if a_log is None or not is_call(step, aten.softplus.default) or len(step.args) > 1:
            continue
        for a, bias in operands(step.args[0], aten.add.Tensor):
            if bias.op == "get_attr" and bias.meta["val"].dim() == 1:
                single = step.meta["val"].dtype is torch.float32
                made = {"g": behind_casts(a), "beta": strength.args[0], "a_log": a_log}
                return made | {"dt_bias": bias} if single else None
    return None


def _normed(program: Program, norm: GatedNorm, delta: fx.Node) -> dict[str, Any]:
    _, heads, width = delta.meta["val"].shape
    gate = program.call(
        aten.reshape.default, norm.gate, [-1, heads * width], before=norm.last, like=delta
    )
    return {"gate": gate, "norm_weight": norm.weight, "eps": norm.eps}


def _replace_view(program: Program, old: fx.Node, new: fx.Node) -> None:
    """Puts `new`, which has the numbers of `old` in another shape, in place of it."""
    _, heads, width = new.meta["val"].shape
    shapes = {2: [-1, width], 3: [-1, heads, width], 4: [1, -1, heads, width]}
    shape = shapes[old.meta["val"].dim()]
    view = program.call(aten.reshape.default, new, shape, before=old, like=old)
    old.replace_all_uses_with(view)
    program.graph.erase_node(old)
