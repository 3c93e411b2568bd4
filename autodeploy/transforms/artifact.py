"""A finished program as plain data: what makes a second start skip transformers and export.

Nodes are written as names and arguments, weights as names of checkpoint tensors; only tensors
that no checkpoint holds (rotary frequencies and the like) travel with the program. Reading one
back needs no tracing, no model class and no fake tensors. Nothing in the file is code: a target
is a torch operator, a Python builtin of a short list, or an implementation registered for an op.
"""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import fx

from autodeploy.custom_ops.contract import CacheGroup, CacheInput, CacheSpec, Contract, LengthRule
from autodeploy.custom_ops.cost import Cost
from autodeploy.custom_ops.op import OPS

from ..errors import TransformError
from .compiled import CompiledProgram
from .compiled_region import CompiledRegion
from .device_copies import copy_each
from .memory_pages import drop_memory_pages
from .program import Program, Weight, parts_of, sample_of

FORMAT = 8
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"operator.{f.__name__}": f
    for f in (
        operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv,
        operator.mod, operator.neg, operator.truediv, operator.ge, operator.le, operator.eq,
        operator.ne, operator.lt, operator.gt,
    )
} | {"torch.sym_max": torch.sym_max, "torch.sym_min": torch.sym_min}  # fmt: skip
_NAMES = {function: name for name, function in _FUNCTIONS.items()}


class StoredTensor(msgspec.Struct, array_like=True):
    """A tensor's bytes, in row order."""

    dtype: str
    shape: list[int]
    data: bytes


class StoredWeight(msgspec.Struct, array_like=True, frozen=True):
    """Names of the tensors joined to make a weight, and how (see `Weight`)."""

    pieces: tuple[str, ...]
    shape: tuple[int, ...]
    dimension: int
    order: tuple[tuple[int, int, int], ...]
    beside: tuple[int, ...]


class StoredProgram(msgspec.Struct):
    """Everything needed to run a program, but the checkpoint."""

    format: int
    nodes: list[list[Any]]
    """[name, kind, target, args, kwargs] in order."""
    weights: dict[str, StoredWeight]
    """By attribute."""
    tensors: dict[str, StoredTensor]
    """Tensors that are in no checkpoint."""
    contract: dict[str, Any]
    facts: dict[str, str]
    """What was built, as text."""
    regions: dict[str, list[list[Any]]]
    """Nodes of compiled regions, by key: what runs if the compiler's own cache is gone."""


def store(
    program: Program,
    checkpoint: Mapping[str, torch.Size],
    read_tensor: Callable[[str], torch.Tensor],
    facts: Mapping[str, str],
    path: Path,
) -> str | None:
    """Writes a program that has been through its recipe; returns why it cannot be, or None.

    checkpoint: shapes of the tensors that a later start will find by name.
    read_tensor: one of them. A converter may have changed what a name holds, so a sample of each
    is compared with what the program uses.
    """
    if program.function is not None:
        return "it is compiled; the compiler keeps its own artifacts"
    if program.module_calls:
        return "parts of the model run as their own code"
    pieces = {piece for weight in program.weights.values() for piece in weight.pieces}
    aliases = _tied(program, pieces, checkpoint)
    own: dict[str, StoredTensor] = {}
    for name in sorted(pieces):
        kept = aliases.get(name, name)
        if kept in checkpoint:
            if not torch.equal(sample_of(read_tensor(kept)), program.source.sample(name).cpu()):
                return f"weight '{name}' differs from the checkpoint's tensor of that name"
            continue
        if name not in program.source.derived:
            return f"weight '{name}' is not in the checkpoint by that name and type"
        own[name] = _stored(program.source.originals[name])
    try:
        nodes = [_node(n) for n in program.graph.nodes]
        found = {n.meta["region"] for n in program.graph.nodes if "region" in n.meta}
        regions = {r.key: [_node(n) for n in r.module.graph.nodes] for r in found}
    except TransformError as error:
        return str(error)
    weights = {
        name: StoredWeight(
            tuple(aliases.get(p, p) for p in weight.pieces),
            weight.shape,
            weight.dimension,
            weight.order,
            weight.beside,
        )
        for name, weight in program.weights.items()
    }
    stored = StoredProgram(
        FORMAT, nodes, weights, own, _contract_to_dict(program.contract), dict(facts), regions
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_bytes(msgspec.msgpack.encode(stored))
    unfinished.replace(path)
    return None


def read(path: Path) -> StoredProgram:
    """A stored program.

    Raises:
        TransformError: the file is damaged or of another version.
    """
    try:
        stored = msgspec.msgpack.decode(path.read_bytes(), type=StoredProgram)
    except (msgspec.DecodeError, OSError) as error:
        raise TransformError(f"artifact '{path}' cannot be read: {error}; delete it") from error
    if stored.format != FORMAT:
        raise TransformError(f"artifact '{path}' has format {stored.format}, not {FORMAT}")
    return stored


def restore(
    stored: StoredProgram, read_tensor: Callable[[str], torch.Tensor]
) -> tuple[CompiledProgram, int]:
    """The program as a callable, and the bytes of its weights.

    read_tensor: a checkpoint tensor by name, on the program's device.
    """
    module = fx.GraphModule(torch.nn.Module(), fx.Graph())
    contract = _contract_from_dict(stored.contract)
    weights: dict[StoredWeight, torch.Tensor] = {}
    reads: list[_Read] = []
    for attribute, weight in stored.weights.items():
        if weight not in weights:
            reads.append(_read(stored, weight, read_tensor, contract.device))
            weights[weight] = reads[-1].value
        module.register_buffer(attribute, weights[weight])
    copy_each(_Read.copy, reads, contract.device)
    total = sum(value.nbytes for value in weights.values())
    _read_nodes(module.graph, stored.nodes, _regions(stored))
    module.recompile()
    inputs = tuple(n.name for n in module.graph.nodes if n.op == "placeholder")
    return CompiledProgram(module.forward, inputs, contract), total


def _read_nodes(
    graph: fx.Graph, stored: list[list[Any]], regions: Mapping[str, CompiledRegion]
) -> None:
    nodes: dict[str, fx.Node] = {}
    for name, kind, target, args, kwargs in stored:
        called = _target(kind, target, regions)
        nodes[name] = graph.create_node(
            kind, called, _decoded(args, nodes), _decoded(kwargs, nodes), name
        )


def _regions(stored: StoredProgram) -> dict[str, CompiledRegion]:
    """Compiled regions by key, as the compiler left them on disk."""
    regions = {}
    for key, nodes in stored.regions.items():
        graph = fx.Graph()
        _read_nodes(graph, nodes, {})
        regions[key] = CompiledRegion(key, graph)
        regions[key].load_or_warn()
    return regions


@dataclasses.dataclass(frozen=True)
class _Read:
    """A weight's memory, and what is to be copied there."""

    value: torch.Tensor
    parts: list[torch.Tensor]
    """[.., n, ..] as the weight, but for `n` along the dimension they are joined."""
    dimension: int

    @torch.no_grad()
    def copy(self) -> None:
        at = 0
        for part in self.parts:
            size = part.shape[self.dimension] if len(self.parts) > 1 else 0
            # One part may be a number without dimensions.
            place = self.value.narrow(self.dimension, at, size) if size else self.value
            place.copy_(part)
            drop_memory_pages(part)
            at += size


def _read(
    stored: StoredProgram,
    weight: StoredWeight,
    read_tensor: Callable[[str], torch.Tensor],
    device: torch.device,
) -> _Read:
    parts = [
        _tensor(stored.tensors[name]) if name in stored.tensors else read_tensor(name)
        for name in weight.pieces
    ]
    # A copy, always: a view into the file would keep all of it mapped, and what is joined
    # would count twice.
    whole = Weight(
        weight.pieces, weight.shape, parts[0].dtype, weight.dimension, weight.order, weight.beside
    )
    if not whole.is_copy:
        return _Read(torch.empty_like(parts[0], device=device), parts, 0)
    value = torch.empty(weight.shape, dtype=parts[0].dtype, device=device)
    return _Read(value, parts_of(whole, parts), weight.dimension)


def _tied(
    program: Program, pieces: set[str], checkpoint: Mapping[str, torch.Size]
) -> dict[str, str]:
    """Names that the checkpoint has under another name, because they are the same tensor."""
    originals = program.source.originals
    held = {
        _place(tensor): name
        for name, tensor in originals.items()
        if tensor.data_ptr() and tuple(checkpoint.get(name, ())) == tuple(tensor.shape)
    }
    return {
        name: held[_place(originals[name])]
        for name in pieces
        if name not in checkpoint and name in originals and _place(originals[name]) in held
    }


def _place(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape)


def _node(node: fx.Node) -> list[Any]:
    if node.op == "call_function":
        target: Any = _target_name(node)
    else:
        target = str(node.target)
    return [node.name, node.op, target, _encoded(node.args), _encoded(dict(node.kwargs))]


def _target_name(node: fx.Node) -> str:
    if "region" in node.meta:
        return f"region:{node.meta['region'].key}"
    if "implementation" in node.meta and not isinstance(node.target, torch._ops.OpOverload):
        return f"op:{node.meta['op']}:{node.meta['implementation']}"
    if isinstance(node.target, torch._ops.OpOverload):
        return f"torch:{node.target.name()}:{node.target._overloadname}"
    if node.target in _NAMES:
        return f"function:{_NAMES[node.target]}"
    raise TransformError(f"node '{node.name}' calls {node.target}, which has no name to store")


def _target(kind: str, target: str, regions: Mapping[str, CompiledRegion]) -> Any:
    if kind != "call_function":
        return target
    family, _, rest = target.partition(":")
    if family == "function":
        return _FUNCTIONS[rest]
    if family == "region":
        return regions[rest]
    if family == "op":
        name, _, implementation = rest.partition(":")
        return OPS[name].implementation(implementation).function
    qualified, _, overload = rest.rpartition(":")
    namespace, _, name = qualified.partition("::")
    return getattr(getattr(getattr(torch.ops, namespace), name.split(".")[0]), overload)


def _encoded(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return {"float": repr(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_encoded(v) for v in value]
    if isinstance(value, dict):
        return {"dict": {str(k): _encoded(v) for k, v in value.items()}}
    for kind in ("dtype", "device", "layout", "memory_format"):
        if isinstance(value, getattr(torch, kind)):
            return {kind: str(value).removeprefix("torch.")}
    raise TransformError(f"an argument of type {type(value).__name__} cannot be stored")


def _decoded(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return tuple(_decoded(v, nodes) for v in value)
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "float":
        return float(content)
    if kind == "dict":
        return {k: _decoded(v, nodes) for k, v in content.items()}
    return torch.device(content) if kind == "device" else getattr(torch, content)


def _stored(value: torch.Tensor) -> StoredTensor:
    plain = value.detach().cpu().contiguous()
    data = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return StoredTensor(_dtype_name(plain.dtype), list(plain.shape), data)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensor(stored: StoredTensor) -> torch.Tensor:
    dtype = getattr(torch, stored.dtype)
    if not stored.data:
        return torch.empty(stored.shape, dtype=dtype)
    return torch.frombuffer(bytearray(stored.data), dtype=dtype).reshape(stored.shape)


def _contract_to_dict(contract: Contract) -> dict[str, Any]:
    return {
        "metadata": list(contract.metadata),
        "vocab_size": contract.vocab_size,
        "max_positions": contract.max_positions,
        "max_tokens": contract.max_tokens,
        "device": str(contract.device),
        "dtype": _dtype_name(contract.dtype),
        "lengths": None if contract.lengths is None else dataclasses.asdict(contract.lengths),
        "eager": list(contract.eager),
        "cost": contract.cost,
        "calls": contract.calls,
        "hidden": contract.hidden,
        "groups": [
            {
                "name": g.name, "per": g.per, "window": g.window,
                "members": [
                    [m.input, m.spec.name, list(m.spec.shape), _dtype_name(m.spec.dtype)]
                    for m in g.members
                ],
            }
            for g in contract.groups
        ],
    }  # fmt: skip


def _contract_from_dict(data: Mapping[str, Any]) -> Contract:
    def group(g: Mapping[str, Any]) -> CacheGroup:
        members = tuple(
            CacheInput(i, CacheSpec(n, tuple(s), getattr(torch, d), g["per"], g["window"]))
            for i, n, s, d in g["members"]
        )
        return CacheGroup(g["name"], g["per"], g["window"], members)

    rule = data["lengths"]
    return Contract(
        metadata=tuple(data["metadata"]),
        groups=tuple(group(g) for g in data["groups"]),
        vocab_size=data["vocab_size"],
        max_positions=data["max_positions"],
        device=torch.device(data["device"]),
        dtype=getattr(torch, data["dtype"]),
        max_tokens=data["max_tokens"],
        lengths=None if rule is None else LengthRule(**rule | {"steps": tuple(rule["steps"])}),
        eager=tuple(data["eager"]),
        cost=msgspec.convert(data["cost"], Cost | None),
        calls=data["calls"],
        hidden=data["hidden"],
    )
