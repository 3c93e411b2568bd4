"""fuse_rest: what no transform recognised is fused by Inductor, piece by piece.

    a = aten.silu(z); b = aten.mul(y, a); c = aten.add(b, residual)
becomes
    (c,) = region_1f0c(z, y, residual)

Kernels that were recognised stay as they are; the ops between them, a launch each, become one or
two. Pieces that are alike, such as those of equal layers, are compiled once, for any number of
tokens, and kept on disk. Right before `lower`, when nothing else looks for patterns any more.

Inside a region nothing is rounded between ops: results are nearer to float32 than those of the
ops one by one, and not the same.
"""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Iterable
from dataclasses import dataclass

import sympy
from torch import fx

from ..compiled_region import SETTINGS, CompiledRegion, fresh_values, region_graph, region_key
from ..program import Program
from ..regions import Region, find_regions, refresh_values, sort_nodes
from ..transform import Site, Transform, register_transform

_log = logging.getLogger("autodeploy")
_SECONDS_PER_LAUNCH = 1.5e-6
_NOTES = "fuse_rest"


@dataclass
class _Notes:
    """What is known between the sites of one program."""

    regions: dict[fx.Node, Region]
    """By their first output."""
    compiled: dict[str, CompiledRegion | None]
    """By key; None: it does not pay, or does not compile."""
    seconds: float = 0.0
    before: int = 0
    after: int = 0


@register_transform("fuse_rest")
@dataclass(frozen=True)
class FuseRest(Transform):
    """Compiles regions of unrecognised ops.

    devices: types of device to do it on. saves: launches that a region must save at least.
    combine: one launch for parts of a region that do not read each other.
    """

    devices: tuple[str, ...] = ("cuda",)
    saves: int = 2
    combine: bool = False

    def sites(self, program: Program) -> Iterable[Site]:
        if program.contract.device.type not in self.devices:
            return
        refresh_values(program)
        found = [r for r in find_regions(program) if r.launches > self.saves]
        program.options[_NOTES] = _Notes({r.outputs[0]: r for r in found}, {})
        for region in found:
            yield Site((region.outputs[0],))

    def gain(self, program: Program, site: Site) -> sympy.Expr | None:
        notes: _Notes = program.options[_NOTES]
        region = notes.regions[site.nodes[0]]
        graph = region_graph(region)
        key = region_key(region, graph)
        if key not in notes.compiled:
            notes.compiled[key] = self._compiled(key, graph, region, site.where, notes)
        compiled = notes.compiled[key]
        if compiled is None:
            return sympy.Integer(0)
        return sympy.Float((region.launches - compiled.launches) * _SECONDS_PER_LAUNCH)

    def rewrite(self, program: Program, site: Site) -> None:
        notes: _Notes = program.options[_NOTES]
        region = notes.regions[site.nodes[0]]
        compiled = notes.compiled[region_key(region, region_graph(region))]
        assert compiled is not None
        notes.before += region.launches
        notes.after += compiled.launches
        replace_region(program.graph, region, compiled)

    def finish(self, program: Program) -> None:
        notes: _Notes | None = program.options.pop(_NOTES, None)
        if notes is None:
            return
        sort_nodes(program.graph)
        kinds = sum(compiled is not None for compiled in notes.compiled.values())
        _log.info(
            "fuse_rest: %d launches became %d, in regions of %d kinds (%.1f s)",
            notes.before, notes.after, kinds, notes.seconds,
        )  # fmt: skip

    def _compiled(
        self, key: str, graph: fx.Graph, region: Region, where: str, notes: _Notes
    ) -> CompiledRegion | None:
        compiled = CompiledRegion(f"{key}{'c' if self.combine else ''}", graph)
        started = time.perf_counter()
        try:
            if not compiled.load():
                values = fresh_values([node.meta["val"] for node in region.inputs()])
                settings = {**SETTINGS, "combo_kernels": self.combine}
                compiled.compile(values, settings)
        except Exception as error:  # noqa: BLE001 - a compiler may fail in any way; the ops still run
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            _log.warning("fuse_rest leaves the ops at %s as they are: %s", where, reason)
            return None
        finally:
            notes.seconds += time.perf_counter() - started
        return compiled if region.launches - compiled.launches >= self.saves else None


def replace_region(graph: fx.Graph, region: Region, compiled: CompiledRegion) -> None:
    """Puts one call in place of a region; nodes may come to stand before what they read."""
    inside = set(region.nodes)
    with graph.inserting_after(region.nodes[-1]):
        call = last = graph.call_function(compiled, region.inputs())
    call.meta["region"] = compiled
    call.meta["val"] = tuple(node.meta["val"] for node in region.outputs)
    replaced: dict[fx.Node, fx.Node] = {}
    for node in region.nodes:
        if node in region.outputs:
            with graph.inserting_after(last):
                last = graph.call_function(operator.getitem, (call, region.outputs.index(node)))
        elif node in region.views and _read_outside(node, region, inside):
            # Made again outside, of what the region returns: it costs nothing there.
            with graph.inserting_after(last):
                last = graph.node_copy(node, lambda n: replaced.get(n, n))
        else:
            continue
        last.meta = dict(node.meta)
        replaced[node] = last
    for node, new in replaced.items():
        for user in [user for user in node.users if user not in inside]:
            user.replace_input_with(node, new)
    for node in reversed(region.nodes):
        graph.erase_node(node)


def _read_outside(view: fx.Node, region: Region, inside: set[fx.Node]) -> bool:
    """Whether a view, or a view of it, is read outside of the region."""
    return any(
        user not in inside or (user in region.views and _read_outside(user, region, inside))
        for user in view.users
    )
