"""Finds an RMS norm of a tensor that is multiplied with an activated gate, written out in ops.

h = float(y); h = h * rsqrt(mean(h ** 2) + eps); out = (weight * half(h)) * silu(float(z))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .transform import is_call
from .walk import VIEWS, behind_casts, operands

aten = torch.ops.aten


@dataclass(frozen=True)
class GatedNorm:
    """A norm over the last dimension of what `find_gated_norm` was given."""

    last: fx.Node
    """The result, in the dtype of the tensor that is normed."""
    gate: fx.Node
    """Before silu, with the same numbers of rows and columns."""
    weight: fx.Node
    eps: float


def find_gated_norm(node: fx.Node) -> GatedNorm | None:
    """The norm over single heads that all of `node` [.., H, D] goes through, and nothing else."""
    dtype, width = node.meta["val"].dtype, node.meta["val"].shape[-1]
    rows = node
    while len(rows.users) == 1 and is_call(next(iter(rows.users)), *VIEWS):
        rows = next(iter(rows.users))
    if rows.meta["val"].shape[-1] != width:
        return None
    single = rows if dtype is torch.float32 else _only(rows, aten._to_copy.default, torch.float32)
    normed, eps = _normed(single)
    if dtype is not torch.float32:
        normed = _only(normed, aten._to_copy.default, dtype)
    weighted = _only(normed, aten.mul.Tensor)
    weight = _other(weighted, normed)
    if weight is None or weight.op != "get_attr" or weight.meta["val"].shape != (width,):
        return None
    product = _only(weighted, aten.mul.Tensor)
    active: Any = _other(product, weighted)
    if not is_call(active, aten.silu.default) or active.meta["val"].dtype is not torch.float32:
        return None
    last = product if dtype is torch.float32 else _only(product, aten._to_copy.default, dtype)
    gate = behind_casts(active.args[0])
    # Rows are split in the same way by views that need not be made.
    same = [str(size) for size in gate.meta["val"].shape]
    if last is None or same != [str(size) for size in last.meta["val"].shape]:
        return None
    while is_call(gate, *VIEWS):
        gate = gate.args[0]  # type: ignore[assignment]
    return GatedNorm(last, gate, weight, eps)


def _normed(rows: fx.Node | None) -> tuple[fx.Node | None, float]:
    """rows * rsqrt(mean(rows ** 2) + eps), and eps."""
    if rows is None or len(rows.users) != 2:
        return None, 0.0
    squared = next((n for n in rows.users if is_call(n, aten.pow.Tensor_Scalar)), None)
    mean = _only(squared, aten.mean.dim)
    total = _only(mean, aten.add.Tensor)
    factor = _only(total, aten.rsqrt.default)
    normed = _only(factor, aten.mul.Tensor)
    if squared is None or mean is None or total is None or normed not in rows.users:
        return None, 0.0
    eps = total.args[1]
    plain = squared.args[1] == 2 and list(mean.args[1:]) in ([[-1], True],)
    return (normed, eps) if plain and isinstance(eps, float) else (None, 0.0)


def _only(node: fx.Node | None, target: Any, dtype: torch.dtype | None = None) -> fx.Node | None:
    """The one reader of a tensor, if it calls `target`."""
    if node is None or len(node.users) != 1:
        return None
    (user,) = node.users
    made: Any = user.meta.get("val")
    if not is_call(user, target) or (dtype is not None and made.dtype is not dtype):
        return None
    return user


def _other(product: fx.Node | None, one: fx.Node | None) -> fx.Node | None:
    for first, second in operands(product, aten.mul.Tensor):
        if first is one:
            return second
    return None
