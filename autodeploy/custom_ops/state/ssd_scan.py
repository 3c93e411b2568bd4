"""State-space duality scan: the recurrence of Mamba-2, one decay per head.

Dao and Gu, Transformers are SSMs, 2024. A single decay per head makes a block of tokens three
matrix products, as in attention with a decaying mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import CacheSpec
from ..op import Cached, register_op
from .recurrence import (
    CachedStates,
    Drive,
    FreshStates,
    Recurrence,
    States,
    Tokens,
    implement_by_block,
    token_by_token,
)

_BLOCK = 64


@register_op(
    "ssd_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias,"
    " Tensor cu_q, bool dt_softplus, float dt_min, float dt_max) -> Tensor",
    axes="t^ (g r) p, t^ (g r), (g r), t^ g n^, t^ g n^, (g r), (g r), m^ -> t^ (g r) p",
)
def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    cu_q: Tensor,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    *,
    drive: Drive = token_by_token,
) -> Tensor:
    """h = exp(dt A) h + dt x Bᵀ; out = h C + D x, within each sequence and head.

    x [T, H, P]; dt [T, H]; A, D, dt_bias [H]; B, C [T, G, N], head h reads group h // (H / G);
    cu_q [B + 1] int32 -> [T, H, P] float32. dt becomes softplus(dt + dt_bias) in its own dtype,
    then is clamped to [dt_min, dt_max]; the state h [H, P, N] is float32 and starts from zeros.
    """
    states = FreshStates((*x.shape[1:], B.shape[-1]), torch.float32, x.device)
    return _scan(drive, states, x, dt, A, B, C, D, dt_bias, cu_q, dt_softplus, dt_min, dt_max)


@register_op(
    "cached_ssd_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D,"
    " Tensor? dt_bias, Tensor(a!) ssm_state, Tensor cu_q, Tensor kv_len, Tensor state_slot,"
    " bool dt_softplus, float dt_min, float dt_max) -> Tensor",
    axes="t^ (g r) p, t^ (g r), (g r), t^ g n^, t^ g n^, (g r), (g r), s^ (g r) p n^,"
    " m^, b^, b^ -> t^ (g r) p",
)
def cached_ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    ssm_state: Tensor,
    cu_q: Tensor,
    kv_len: Tensor,
    state_slot: Tensor,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    *,
    drive: Drive = token_by_token,
) -> Tensor:
    """`ssd_scan` that continues from ssm_state [slots, H, P, N] float32 and updates it.

    kv_len [B] int32, state_slot [B] int64. A sequence without new tokens leaves its row alone.
    """
    states = CachedStates(ssm_state, cu_q, kv_len, state_slot)
    return _scan(drive, states, x, dt, A, B, C, D, dt_bias, cu_q, dt_softplus, dt_min, dt_max)


def _fake(x: Tensor, *others: Any, **flags: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def _caches(arguments: Mapping[str, Any]) -> tuple[CacheSpec, ...]:
    shape = (*arguments["x"].shape[1:], arguments["B"].shape[-1])
    return (CacheSpec("ssm_state", shape, torch.float32, per="sequence"),)


ssd_scan.cached = Cached(op=cached_ssd_scan, caches=_caches)
for _op in (ssd_scan, cached_ssd_scan):
    _op.fake(_fake)
    implement_by_block(_op)


def _scan(
    drive: Drive,
    states: States,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    cu_q: Tensor,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> Tensor:
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(dt_min, dt_max).float()
    x = x.float()
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    tokens = (x * dt.unsqueeze(-1), dt * A.float(), B.float(), C.float())
    out = drive(Recurrence(_step, _block, _BLOCK), tokens, out, states, cu_q)
    return out if D is None else torch.addcmul(out, x, D.float().unsqueeze(-1))


def _step(tokens: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    inputs, log_decay, B, C = tokens
    repeats = inputs.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(repeats, 1), C.repeat_interleave(repeats, 1)
    state.mul_(log_decay.exp()[..., None, None]).addcmul_(inputs.unsqueeze(-1), B.unsqueeze(-2))
    return torch.matmul(state, C.unsqueeze(-1)).squeeze(-1), state


def _block(tokens: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    inputs, log_decay, B, C = (tensor.transpose(0, 1) for tensor in tokens)
    length, repeats = inputs.shape[1], inputs.shape[0] // B.shape[0]
    since_start = log_decay.cumsum(1)  # [H, l]
    later = torch.ones(length, length, dtype=torch.bool, device=inputs.device).triu(1)
    between = (since_start.unsqueeze(2) - since_start.unsqueeze(1)).masked_fill(later, -torch.inf)
    scores = (C @ B.transpose(1, 2)).repeat_interleave(repeats, 0) * between.exp()
    B, C = B.repeat_interleave(repeats, 0), C.repeat_interleave(repeats, 0)
    out = scores @ inputs + (C * since_start.exp().unsqueeze(-1)) @ state.transpose(1, 2)
    until_end = (since_start[:, -1:] - since_start).exp().unsqueeze(-1)
    state = torch.baddbmm(
        state * since_start[:, -1].exp()[:, None, None], inputs.transpose(1, 2), B * until_end
    )
    return out.transpose(0, 1), state
