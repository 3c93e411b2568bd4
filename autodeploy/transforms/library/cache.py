"""cache: ops that mix tokens read earlier tokens from caches.

    y = autodeploy.attention(q, k, v, cu_q, scale)
becomes
    y = autodeploy.paged_attention(q, k, v, k_cache_0, v_cache_0, cu_q, kv_len,
                                   block_table_tokens, slot_tokens, scale)

Nothing here knows attention from a state-space scan: each op declares its caching form and the
caches one site needs (`Op.cached`), and arguments are bound by name. Sites, not modules, get
caches: a block that a model uses at several depths gets one at each. Caches that are read the
same way form a group, which shares one block table (per token) or one slot (per sequence).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autodeploy.custom_ops.contract import (
    METADATA,
    PER_GROUP,
    CacheGroup,
    CacheInput,
    CacheSpec,
)
from autodeploy.custom_ops.op import op_of

from ...errors import TransformError
from ..cost import cost_of
from ..program import Fact, Program
from ..transform import Site, Transform, register_transform

# Sizes behind the symbols: primes that differ from each other, from those of capture's sample,
# and from what models have as widths. Inductor takes sizes with equal samples for one.
_SAMPLE_PAGES = 43
_SAMPLE_PAGE_SIZE = 47
_SAMPLE_WIDTH = 53


@register_transform("cache")
@dataclass(frozen=True)
class Cache(Transform):
    """Replaces every op that declares a caching form by that form."""

    needs = frozenset({Fact.FUNCTIONAL, Fact.CANONICAL})
    gives = frozenset({Fact.CACHED})
    breaks = frozenset({Fact.FUNCTIONAL})

    def sites(self, program: Program) -> Iterable[Site]:
        for node in program.graph.nodes:
            op = op_of(node.target) if node.op == "call_function" else None
            if op is not None and op.cached is not None:
                yield Site((node,))

    def rewrite(self, program: Program, site: Site) -> None:
        node = site.nodes[0]
        op = op_of(node.target)
        if op is None or op.cached is None:
            raise TransformError(f"{site.where} has no caching form")
        given = op.bind(node.args, node.kwargs)
        values = fx.node.map_arg(given, lambda n: n.meta["val"])
        specs = op.cached.caches(values)
        token_group = next((group_name(s) for s in specs if s.per == "token"), None)
        arguments: list[Any] = []
        for name in op.cached.op.arguments:
            wanted = [spec for spec in specs if spec.name == name]
            if name in given:
                arguments.append(given[name])
            elif op.cached.op.is_list(name):
                arguments.append([_cache_input(program, spec) for spec in wanted])
            elif wanted:
                arguments.append(_cache_input(program, wanted[0]))
            else:
                arguments.append(_metadata_input(program, name, token_group, op.name))
        cached = program.call(op.cached.op.overload, *arguments, before=node, like=node)
        node.replace_all_uses_with(cached)
        program.graph.erase_node(node)

    def finish(self, program: Program) -> None:
        groups: dict[str, list[CacheInput]] = {}
        for cache in program.caches:
            groups.setdefault(group_name(cache.spec), []).append(cache)
        caches = {cache.input for cache in program.caches}
        for node in list(program.inputs().values()):
            if not node.users:
                program.graph.erase_node(node)
        program.contract = dataclasses.replace(
            program.contract,
            metadata=tuple(name for name in program.inputs() if name not in caches),
            groups=tuple(
                CacheGroup(name, members[0].spec.per, members[0].spec.window, tuple(members))
                for name, members in groups.items()
            ),
            cost=cost_of(program),
        )


def group_name(spec: CacheSpec) -> str:
    """Caches of one name share pages or slots."""
    if spec.per == "sequence":
        return "sequences"
    return f"window_{spec.window}" if spec.window else "tokens"


def _cache_input(program: Program, spec: CacheSpec) -> fx.Node:
    name = f"{spec.name}_{sum(c.spec.name == spec.name for c in program.caches)}"
    program.caches.append(CacheInput(name, spec))
    leading = (_SAMPLE_PAGES, _SAMPLE_PAGE_SIZE) if spec.per == "token" else (_SAMPLE_PAGES,)
    # Caches of a group have as many pages or slots as the first one: the same symbols.
    symbols = program.options.setdefault("cache_symbols", {})
    extents = symbols.get(group_name(spec))
    if extents is None:
        first = _dynamic(program, name, leading, spec.dtype, len(leading))
        extents = symbols[group_name(spec)] = tuple(first.shape)
    with program.fake_mode:
        value = torch.empty(
            (*extents, *spec.shape), dtype=spec.dtype, device=program.contract.device
        )
    return program.add_input(name, value)


def _metadata_input(program: Program, name: str, group: str | None, op: str) -> fx.Node:
    if name not in METADATA:
        raise TransformError(
            f"op '{op}': its caching form asks for '{name}', which is neither an argument of the "
            f"op nor step metadata; known metadata: {', '.join(METADATA)}"
        )
    full = f"{name}_{group}" if name in PER_GROUP else name
    inputs = program.inputs()
    if full in inputs:
        return inputs[full]
    tokens = inputs["input_ids"].meta["val"].shape[1]
    sequences = inputs["cu_q"].meta["val"].shape[0] - 1
    device = program.contract.device
    with program.fake_mode:
        if name == "kv_len":
            value = torch.empty(sequences, dtype=torch.int32, device=device)
        elif name == "state_slot":
            value = torch.empty(sequences, dtype=torch.int64, device=device)
        elif name == "slot":
            value = torch.empty(tokens, dtype=torch.int64, device=device)
        else:
            value = None
    if name == "block_table":
        # Its width is a symbol of its own; its height is the number of sequences.
        width = _dynamic(program, full, (_SAMPLE_WIDTH,), torch.int32, 1).shape[0]
        with program.fake_mode:
            value = torch.empty(sequences, width, dtype=torch.int32, device=device)
    if value is None:
        raise TransformError(f"step metadata '{name}' cannot be added after capture")
    return program.add_input(full, value)


def _dynamic(
    program: Program, name: str, shape: tuple[int, ...], dtype: torch.dtype, dynamic: int
) -> torch.Tensor:
    """A fake tensor whose first `dynamic` extents are symbols."""
    # A second of imports that a start from a kept program never needs.
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    sizes = [DimDynamic.DYNAMIC] * dynamic + [DimDynamic.STATIC] * (len(shape) - dynamic)
    return program.fake_mode.from_tensor(
        torch.empty(shape, dtype=dtype, device=program.contract.device),
        source=ConstantSource(name),
        symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes),
    )
