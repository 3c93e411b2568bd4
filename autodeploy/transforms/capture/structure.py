"""Whether two pieces of a graph compute the same function of one node.

Layers repeat: what was shown for one by evaluating it holds for every other whose piece has the
same operations on the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from ..program import Program


class Structure:
    """Keys of pieces of one program."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._weights: dict[str, Hashable] = {}

    def above(self, top: fx.Node, bottom: fx.Node) -> list[fx.Node]:
        """What `top` is computed from, in order, without what `bottom` is computed from."""
        found: set[fx.Node] = set()
        waiting = [top]
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting.extend(node.all_input_nodes if node is not bottom else ())
        return [n for n in top.graph.nodes if n in found]

    def key(self, top: fx.Node, bottom: fx.Node) -> Hashable:
        """Equal for pieces that give the same `top` for the same `bottom`."""
        places: dict[fx.Node, int] = {}
        lines = []
        for node in self.above(top, bottom):
            places[node] = len(places)
            if node is bottom:
                lines.append(("bottom", str(node.meta["val"].shape), node.meta["val"].dtype))
            elif node.op == "get_attr":
                lines.append(("weight", self._weight(str(node.target)), None))
            else:
                arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: places[n])
                lines.append((str(node.target), repr(arguments), None))
        return tuple(lines)

    def _weight(self, name: str) -> Any:
        if name not in self._weights:
            value = self._program.read_weight(name)
            if isinstance(value, FakeTensor) or value.is_meta:
                self._weights[name] = name
            else:
                number = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
                digest = hashlib.blake2b(number.tobytes()).digest()
                self._weights[name] = (tuple(value.shape), value.dtype, digest)
        return self._weights[name]
