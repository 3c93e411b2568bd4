"""fuse_conv_ssd: what is between the projections of a state-space layer becomes one op.

    x, B, C = split(cached_causal_conv1d(h, w, bias, .., "silu"))
    y = cached_ssd_scan(x, dt, -exp(a_log), B, C, D, dt_bias, ..)
    y = y * silu(float(z))
becomes
    y = conv_ssd_scan(h, w, bias, dt, a_log, D, dt_bias, z, .., log_rates=True)

Which columns of the convolution become x, B and C is worked out, not matched (see `Columns`). The
gate may be missing, and rates may be anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autodeploy.custom_ops.state import cached_causal_conv1d, cached_ssd_scan, conv_ssd_scan

from ..columns import Columns
from ..program import Fact, Program
from ..transform import Site, Transform, is_call, register_transform
from ..walk import VIEWS, behind_casts, behind_views, drop_calls, leads_only_to, negated_exponent

aten = torch.ops.aten


@register_transform("fuse_conv_ssd")
@dataclass(frozen=True)
class FuseConvSsd(Transform):
    """Joins a convolution to the scan it feeds. `devices`: types with a kernel for it."""

    needs = frozenset({Fact.CACHED})
    devices: tuple[str, ...] = ("cuda",)

    def sites(self, program: Program) -> Iterable[Site]:
        if program.contract.device.type not in self.devices:
            return
        columns = Columns(program)
        for node in program.graph.nodes:
            if is_call(node, cached_ssd_scan.overload):
                conv = find_convolution(node, columns)
                if conv is not None:
                    yield Site((node, conv))

    def rewrite(self, program: Program, site: Site) -> None:
        node, conv = site.nodes
        options = cached_ssd_scan.bind(node.args, node.kwargs)
        options |= {"gate": None, "log_rates": False}
        entering = cached_causal_conv1d.bind(conv.args, conv.kwargs)
        options |= {
            "x": entering["x"], "conv_weight": entering["weight"], "conv_bias": entering["bias"],
            "conv_state": entering["conv_state"], "activation": entering["activation"],
        }  # fmt: skip
        a_log = negated_exponent(options["A"])
        if a_log is not None:
            options |= {"A": a_log, "log_rates": True}
        last, gate = _gated(node) or (node, None)
        if gate is not None:
            _, heads, width = node.meta["val"].shape
            options["gate"] = program.call(
                aten.reshape.default, gate, [-1, heads * width], before=last, like=node
            )
        fused = program.call(
            conv_ssd_scan.overload, *(options[name] for name in conv_ssd_scan.arguments),
            before=last, like=node,
        )  # fmt: skip
        if gate is not None:
            shape = [1, -1, *last.meta["val"].shape[2:]]
            fused = program.call(aten.reshape.default, fused, shape, before=last, like=node)
        last.replace_all_uses_with(fused)
        drop_calls(program.graph, [conv, node])


def find_convolution(scan: fx.Node, columns: Columns) -> fx.Node | None:
    """The convolution whose output is a scan's x, B and C, in order; None if others read it."""
    given = cached_ssd_scan.bind(scan.args, scan.kwargs)
    found = [columns.of(given[name]) for name in ("x", "B", "C")]
    if any(part is None for part in found):
        return None
    places = torch.cat([part.flatten() for part in found if part is not None])
    source = columns.source(places)
    if source is None or not is_call(source[0], cached_causal_conv1d.overload):
        return None
    conv, places = source
    entering = cached_causal_conv1d.bind(conv.args, conv.kwargs)
    width = int(conv.meta["val"].shape[1])
    same = all(entering[name] is given[name] for name in ("cu_q", "kv_len", "state_slot"))
    whole = torch.equal(places, torch.arange(width))
    return conv if same and whole and leads_only_to(conv, scan) else None


def _gated(scan: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """A product [1, T, ..] of all of a scan's result with silu(z), in float32, and z."""
    y = scan
    while len(y.users) == 1 and is_call(next(iter(y.users)), *VIEWS):
        y = next(iter(y.users))
    product: Any = next(iter(y.users)) if len(y.users) == 1 else None
    if not is_call(product, aten.mul.Tensor) or product.kwargs:
        return None
    shapes = [[str(n) for n in node.meta["val"].shape] for node in (y, product)]
    for active in product.args:
        if active is y or not is_call(active, aten.silu.default):
            continue
        gate = behind_casts(active.args[0])
        same = [str(n) for n in gate.meta["val"].shape]
        single = active.meta["val"].dtype is torch.float32
        if single and shapes == [same, same] and same[0] == "1" and len(same) in (3, 4):
            return product, behind_views(gate)
    return None
