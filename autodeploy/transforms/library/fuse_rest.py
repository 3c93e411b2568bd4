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
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from ..compiled_region import SETTINGS, CompiledRegion, fresh_values, region_graph, region_key
from ..program import Program
from ..regions import Region, find_regions, refresh_values, sort_nodes
from ..transform import Site, Transform, register_transform

_log = logging.getLogger("autodeploy")
_NOTES = "fuse_rest"


@dataclass
class _Kind:
    """Regions that are alike, and the function they share."""

    regions: list[Region]
    launches: int = 0
    """Of each, when its ops run one by one."""
    compiled: CompiledRegion | None = None


@register_transform("fuse_rest")
@dataclass(frozen=True)
class FuseRest(Transform):
    """Compiles regions of unrecognised ops.

    devices: types of device to do it on. saves: launches of a step that regions of a kind must
    save together to be worth compiling. combine: one launch for parts of a region that do not read
    each other.
    """

    devices: tuple[str, ...] = ("cuda",)
    saves: int = 8
    combine: bool = True

    def sites(self, program: Program) -> Iterable[Site]:
        if program.contract.device.type not in self.devices:
            return

        refresh_values(program)
        kinds: dict[str, _Kind] = {}
        for region in find_regions(program):
            key = region_key(region, region_graph(region))
            kinds.setdefault(key, _Kind([], region.launches)).regions.append(region)
        kept = {key: kind for key, kind in kinds.items() if self._pays(kind, 1)}
        for key, kind in kept.items():
            kind.compiled = self._compiled(key, kind)
        program.options[_NOTES] = [k for k in kept.values() if k.compiled is not None]
        for kind in program.options[_NOTES]:
            for region in kind.regions:
                yield Site((region.outputs[0],))

    def rewrite(self, program: Program, site: Site) -> None:
        for kind in program.options[_NOTES]:
            for region in kind.regions:
                if region.outputs[0] is site.nodes[0]:
                    replace_region(program.graph, region, kind.compiled)

    def finish(self, program: Program) -> str:
        kinds: list[_Kind] = program.options.pop(_NOTES, [])
        if not kinds:
            return ""
        sort_nodes(program.graph)
        before = sum(kind.launches * len(kind.regions) for kind in kinds)
        after = sum(kind.compiled.launches * len(kind.regions) for kind in kinds if kind.compiled)
        return f"{before} launches are {after}, in regions of {len(kinds)} kinds"

    def _pays(self, kind: _Kind, launches: int) -> bool:
        return (kind.launches - launches) * len(kind.regions) >= self.saves

    def _compiled(self, key: str, kind: _Kind) -> CompiledRegion | None:
        """The function of a kind; None if it saves too little or cannot be compiled."""
        region = kind.regions[0]
        settings = {**SETTINGS, "combo_kernels": self.combine}
        compiled = CompiledRegion(f"{key} {sorted(settings.items())}", region_graph(region))
        try:
            if not compiled.load():
                values = fresh_values([node.meta["val"] for node in region.inputs()])
                compiled.compile(values, settings)
        except Exception as error:  # noqa: BLE001 - however a compiler fails, the ops still run
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            where = Site((region.outputs[0],)).where
            _log.warning("fuse_rest leaves the ops at %s as they are: %s", where, reason)
            return None
        return compiled if self._pays(kind, compiled.launches) else None


def replace_region(graph: fx.Graph, region: Region, compiled: CompiledRegion) -> None:
    """Puts one call in place of a region; nodes may come to stand before what they read."""
    inside = set(region.nodes)
    with graph.inserting_after(region.outputs[-1]):
        call = last = graph.call_function(compiled, region.inputs())
    call.meta["region"] = compiled
    call.meta["val"] = tuple(node.meta["val"] for node in region.outputs)
    replaced: dict[fx.Node, fx.Node] = {}
    for node in region.nodes:
        if node in region.outputs:
            with graph.inserting_after(last):
                last = graph.call_function(operator.getitem, (call, region.outputs.index(node)))
            last.meta = dict(node.meta)
            replaced[node] = last
    # A view of a result that something outside reads is made again there, where it costs nothing.
    results = set(region.nodes) - region.views
    for node in region.nodes:
        if node in region.views and results.intersection(node.all_input_nodes):
            results.add(node)
            with graph.inserting_after(last):
                last = graph.node_copy(node, lambda n: replaced.get(n, n))
            replaced[node] = last
    for node, new in replaced.items():
        for user in [user for user in node.users if user not in inside]:
            user.replace_input_with(node, new)
    for node in reversed(region.nodes):
        if not node.users:
            graph.erase_node(node)
