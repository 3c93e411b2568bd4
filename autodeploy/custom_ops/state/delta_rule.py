"""Gated delta rules: linear attention that overwrites what its state already predicts.

The state S [Dk, Dv] of a head decays, then moves towards mapping the new key to the new value.
Gated DeltaNet (Yang et al., 2024) has one decay per head, Kimi Delta Attention (2025) one per key
channel; all else is shared. A block of tokens is solved at once in the WY form: the corrections
of its tokens depend on each other through a unit lower triangular system.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
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
# Decays per channel need [H, l, l, Dk] numbers in a block: 4 MiB for 32 heads of 128.
_BLOCK_PER_CHANNEL = 16
_NORM_EPS = 1e-6


@register_op(
    "gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor cu_q,"
    " bool qk_l2norm=False) -> Tensor",
    axes="t^ g k^, t^ g k^, t^ (g r) v, t^ (g r), t^ (g r), n^ -> t^ (g r) v",
)
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_q: Tensor,
    qk_l2norm: bool = False,
    *,
    drive: Drive = token_by_token,
) -> Tensor:
    """S = exp(g) S; S = S + k beta (v - kᵀ S)ᵀ; out = qᵀ S / sqrt(Dk), within each sequence.

    q, k [T, G, Dk], head h reads group h // (H / G); v [T, H, Dv]; g, beta [T, H]; cu_q [B + 1]
    int32 -> [T, H, Dv] in q's dtype. g is a logarithm, at most 0. qk_l2norm scales q and k to
    length 1 first (1e-6 is added to the squared length). All in float32; S starts from zeros.
    """
    states = _fresh(k, v)
    return _mix(drive, states, q, k, v, g.unsqueeze(-1), beta, cu_q, qk_l2norm)


@register_op(
    "cached_gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta,"
    " Tensor(a!) delta_state, Tensor cu_q, Tensor kv_len, Tensor state_slot,"
    " bool qk_l2norm=False) -> Tensor",
    axes="t^ g k^, t^ g k^, t^ (g r) v, t^ (g r), t^ (g r), s^ (g r) k^ v, n^, b^, b^"
    " -> t^ (g r) v",
)
def cached_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    delta_state: Tensor,
    cu_q: Tensor,
    kv_len: Tensor,
    state_slot: Tensor,
    qk_l2norm: bool = False,
    *,
    drive: Drive = token_by_token,
) -> Tensor:
    """`gated_delta_rule` that continues from delta_state [slots, H, Dk, Dv] float32.

    kv_len [B] int32, state_slot [B] int64. A sequence without new tokens leaves its row alone.
    """
    states = CachedStates(delta_state, cu_q, kv_len, state_slot)
    return _mix(drive, states, q, k, v, g.unsqueeze(-1), beta, cu_q, qk_l2norm)


@register_op(
    "kimi_delta_attention(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor cu_q,"
    " bool qk_l2norm=False) -> Tensor",
    axes="t^ g k^, t^ g k^, t^ (g r) v, t^ (g r) k^, t^ (g r), n^ -> t^ (g r) v",
)
def kimi_delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_q: Tensor,
    qk_l2norm: bool = False,
    *,
    drive: Drive = token_by_token,
) -> Tensor:
    """`gated_delta_rule` with a decay per key channel: g [T, H, Dk]."""
    return _mix(drive, _fresh(k, v), q, k, v, g, beta, cu_q, qk_l2norm)


@register_op(
    "cached_kimi_delta_attention(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta,"
    " Tensor(a!) delta_state, Tensor cu_q, Tensor kv_len, Tensor state_slot,"
    " bool qk_l2norm=False) -> Tensor",
    axes="t^ g k^, t^ g k^, t^ (g r) v, t^ (g r) k^, t^ (g r), s^ (g r) k^ v, n^, b^, b^"
    " -> t^ (g r) v",
)
def cached_kimi_delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    delta_state: Tensor,
    cu_q: Tensor,
    kv_len: Tensor,
    state_slot: Tensor,
    qk_l2norm: bool = False,
    *,
    drive: Drive = token_by_token,
) -> Tensor:
    """`kimi_delta_attention` that continues from delta_state [slots, H, Dk, Dv] float32.

    kv_len [B] int32, state_slot [B] int64. A sequence without new tokens leaves its row alone.
    """
    states = CachedStates(delta_state, cu_q, kv_len, state_slot)
    return _mix(drive, states, q, k, v, g, beta, cu_q, qk_l2norm)


def _fake(q: Tensor, k: Tensor, v: Tensor, *others: Any, **flags: Any) -> Tensor:
    return v.new_empty(v.shape, dtype=q.dtype)


def _caches(arguments: Mapping[str, Any]) -> tuple[CacheSpec, ...]:
    shape = _state_shape(arguments["k"], arguments["v"])
    return (CacheSpec("delta_state", shape, torch.float32, per="sequence"),)


gated_delta_rule.cached = Cached(op=cached_gated_delta_rule, caches=_caches)
kimi_delta_attention.cached = Cached(op=cached_kimi_delta_attention, caches=_caches)
for _op in (
    gated_delta_rule,
    cached_gated_delta_rule,
    kimi_delta_attention,
    cached_kimi_delta_attention,
):
    _op.fake(_fake)
    implement_by_block(_op)


def _state_shape(k: Tensor, v: Tensor) -> tuple[int, ...]:
    return (v.shape[1], k.shape[-1], v.shape[-1])


def _fresh(k: Tensor, v: Tensor) -> FreshStates:
    return FreshStates(_state_shape(k, v), torch.float32, v.device)


def _mix(
    drive: Drive,
    states: States,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_q: Tensor,
    qk_l2norm: bool,
) -> Tensor:
    """g [T, H, 1] or [T, H, Dk]."""
    dtype, repeats = q.dtype, v.shape[1] // k.shape[1]
    q, k = q.float(), k.float()
    if qk_l2norm:
        q, k = _to_unit_length(q), _to_unit_length(k)
    q = q * q.shape[-1] ** -0.5
    q, k = q.repeat_interleave(repeats, 1), k.repeat_interleave(repeats, 1)
    tokens = (q, k, v.float(), g.float(), beta.float().unsqueeze(-1))
    out = v.new_zeros(v.shape, dtype=torch.float32)
    length = _BLOCK if g.shape[-1] == 1 else _BLOCK_PER_CHANNEL
    return drive(Recurrence(_step, _block, length), tokens, out, states, cu_q).to(dtype)


def _to_unit_length(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _NORM_EPS)


def _step(tokens: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v, g, beta = tokens
    state.mul_(g.exp().unsqueeze(-1))
    correction = (v - (k.unsqueeze(-2) @ state).squeeze(-2)) * beta
    state.addcmul_(k.unsqueeze(-1), correction.unsqueeze(-2))
    return (q.unsqueeze(-2) @ state).squeeze(-2), state


def _block(tokens: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v, g, beta = (tensor.transpose(0, 1) for tensor in tokens)  # each [H, l, ...]
    since_start = g.cumsum(1)
    decayed, written = since_start.exp(), k * beta
    system, scores = _decayed_products((written, q), k, since_start)
    solved = torch.linalg.solve_triangular(
        system, torch.cat([v * beta, written * decayed], -1), upper=False, unitriangular=True
    )
    wanted, predicting = solved.split([v.shape[-1], k.shape[-1]], -1)
    correction = wanted - predicting @ state
    out = (q * decayed) @ state + scores @ correction
    until_end = (since_start[:, -1:] - since_start).exp()
    state = torch.baddbmm(
        state * decayed[:, -1].unsqueeze(-1), (k * until_end).transpose(1, 2), correction
    )
    return out.transpose(0, 1), state


def _decayed_products(
    readers: tuple[Tensor, ...], k: Tensor, since_start: Tensor
) -> tuple[Tensor, ...]:
    """r_i · k_j, each channel decayed from token j to token i, for j <= i: [H, l, l] each."""
    length = k.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=k.device).triu(1)
    # Masked before exp: from a later token to an earlier one the decay would overflow.
    between = since_start.unsqueeze(2) - since_start.unsqueeze(1)
    between = between.masked_fill_(later.unsqueeze(-1), -torch.inf).exp_()
    if between.shape[-1] == 1:
        return tuple((r @ k.transpose(1, 2)) * between.squeeze(-1) for r in readers)
    decayed_keys = between.mul_(k.unsqueeze(1))  # [H, i, j, Dk]
    products = torch.stack(readers, 2) @ decayed_keys.transpose(2, 3)
    return products.unbind(2)
