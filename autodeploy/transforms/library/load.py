"""load: weights are read, joined and put on their device, once.

Peak memory is the weights plus one tensor: a joined weight's pieces are released as soon as it
is made, if the checkpoint was loaded for this program. A live model's tensors are the user's:
those that are used as they are stay shared, never copied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ..memory_pages import return_unused_blocks
from ..program import Fact, Program
from ..transform import Site, Transform, register_transform


@register_transform("load")
@dataclass(frozen=True)
class Load(Transform):
    """Materialises every weight attribute."""

    gives = frozenset({Fact.LOADED})
    breaks = frozenset({Fact.LAZY_WEIGHTS})
    needs = frozenset({Fact.LAZY_WEIGHTS})

    def sites(self, program: Program) -> Iterable[Site]:
        readers = Counter(piece for w in program.weights.values() for piece in w.pieces)
        program.options["weight_readers"] = readers
        seen: set[str] = set()
        for node in program.graph.nodes:
            if node.op == "get_attr" and node.target not in seen:
                seen.add(str(node.target))
                yield Site((node,), note=f"weight {node.target}")

    def rewrite(self, program: Program, site: Site) -> None:
        name = str(site.nodes[0].target)
        weight = program.weights[name]
        value = program.source.read(weight).to(program.contract.device)
        program.graph_module.register_buffer(name, value)
        readers: Counter[str] = program.options["weight_readers"]
        readers.subtract(weight.pieces)
        if weight.is_copy:
            program.source.release(piece for piece in weight.pieces if readers[piece] == 0)

    def finish(self, program: Program) -> None:
        del program.options["weight_readers"]
        return_unused_blocks(program.contract.device)
