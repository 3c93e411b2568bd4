"""Gated delta layers between their projections: convolution, gates, delta rule and gated norm.

Decoding, each of these parts moves a few kilobytes and costs a launch; only the states are large.
As one op an implementation can run them as one kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..op import register_op
from .causal_conv1d import cached_causal_conv1d
from .delta_rule import cached_gated_delta_rule


@register_op(
    "conv_delta_rule(Tensor x, Tensor conv_weight, Tensor? conv_bias, Tensor g, Tensor beta,"
    " Tensor? a_log, Tensor? dt_bias, Tensor? gate, Tensor? norm_weight, Tensor(a!) conv_state,"
    " Tensor(b!) delta_state, Tensor cu_q, Tensor kv_len, Tensor state_slot,"
    " str? activation=None, bool qk_l2norm=False, float eps=0.0) -> Tensor"
)
def conv_delta_rule(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    g: Tensor,
    beta: Tensor,
    a_log: Tensor | None,
    dt_bias: Tensor | None,
    gate: Tensor | None,
    norm_weight: Tensor | None,
    conv_state: Tensor,
    delta_state: Tensor,
    cu_q: Tensor,
    kv_len: Tensor,
    state_slot: Tensor,
    activation: str | None = None,
    qk_l2norm: bool = False,
    eps: float = 0.0,
) -> Tensor:
    """x [T, 2 G Dk + H Dv], queries, keys and values side by side -> [T, H, Dv].

    `cached_causal_conv1d` over x, then `cached_gated_delta_rule`. g, beta [T, H]: what that op
    reads, or, if there are a_log and dt_bias [H], what `delta_gates` makes it from. With a gate
    [T, H Dv] and norm_weight [Dv] the result goes through `gated_norm`.
    """
    q, k, v = split_heads(
        cached_causal_conv1d.reference(
            x, conv_weight, conv_bias, conv_state, cu_q, kv_len, state_slot, activation
        ),
        delta_state,
    )
    if a_log is not None and dt_bias is not None:
        g, beta = delta_gates(g, beta, a_log, dt_bias)
    y = cached_gated_delta_rule.reference(
        q, k, v, g, beta, delta_state, cu_q, kv_len, state_slot, qk_l2norm
    )
    if gate is None or norm_weight is None:
        return y
    return gated_norm(y, gate.view(y.shape), norm_weight, eps)


@conv_delta_rule.fake
def _(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    g: Tensor,
    beta: Tensor,
    a_log: Tensor | None,
    dt_bias: Tensor | None,
    gate: Tensor | None,
    norm_weight: Tensor | None,
    conv_state: Tensor,
    delta_state: Tensor,
    cu_q: Tensor,
    kv_len: Tensor,
    state_slot: Tensor,
    activation: str | None = None,
    qk_l2norm: bool = False,
    eps: float = 0.0,
) -> Tensor:
    return x.new_empty((x.shape[0], delta_state.shape[1], delta_state.shape[3]))


def split_heads(mixed: Tensor, delta_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k [T, G, Dk] and v [T, H, Dv] of [T, 2 G Dk + H Dv]."""
    heads, keys, values = delta_state.shape[1:]
    width = (mixed.shape[1] - heads * values) // 2
    q, k, v = mixed.split([width, width, heads * values], -1)
    return q.unflatten(1, (-1, keys)), k.unflatten(1, (-1, keys)), v.unflatten(1, (heads, values))


def delta_gates(a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """-exp(a_log) softplus(a + dt_bias) in float32, and sigmoid(b)."""
    return -a_log.float().exp() * F.softplus(a.float() + dt_bias), b.sigmoid()


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """An RMS norm of y [.., D], rounded to its dtype, times weight [D], times silu(gate)."""
    normed = y.float() * torch.rsqrt(y.float().pow(2).mean(-1, keepdim=True) + eps)
    return ((weight * normed.to(y.dtype)) * F.silu(gate.float())).to(y.dtype)
