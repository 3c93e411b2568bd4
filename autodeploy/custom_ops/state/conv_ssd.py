"""State-space layers between their projections: convolution, scan and the gate of its result.

Decoding, each of these parts moves a few kilobytes and costs a launch; only the states are large.
As one op an implementation can run them as one kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..op import register_op
from .causal_conv1d import cached_causal_conv1d
from .ssd_scan import cached_ssd_scan


@register_op(
    "conv_ssd_scan(Tensor x, Tensor conv_weight, Tensor? conv_bias, Tensor dt, Tensor A,"
    " Tensor? D, Tensor? dt_bias, Tensor? gate, Tensor(a!) conv_state, Tensor(b!) ssm_state,"
    " Tensor cu_q, Tensor kv_len, Tensor state_slot, str? activation, bool dt_softplus,"
    " float dt_min, float dt_max, bool log_rates=False) -> Tensor"
)
def conv_ssd_scan(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    gate: Tensor | None,
    conv_state: Tensor,
    ssm_state: Tensor,
    cu_q: Tensor,
    kv_len: Tensor,
    state_slot: Tensor,
    activation: str | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    log_rates: bool = False,
) -> Tensor:
    """x [T, H P + 2 G N], what the scan calls x, B and C side by side -> [T, H, P] float32.

    `cached_causal_conv1d` over x, then `cached_ssd_scan`, with A [H]; log_rates: A holds
    logarithms, of which the scan reads -exp. With a gate [T, H P] the result is times silu(gate),
    in float32.
    """
    mixed = cached_causal_conv1d.reference(
        x, conv_weight, conv_bias, conv_state, cu_q, kv_len, state_slot, activation
    )
    x, B, C = split_scan(mixed, ssm_state)
    rates = -A.float().exp() if log_rates else A
    y: Tensor = cached_ssd_scan.reference(
        x, dt, rates, B, C, D, dt_bias, ssm_state, cu_q, kv_len, state_slot, dt_softplus, dt_min,
        dt_max,
    )  # fmt: skip
    return y if gate is None else y * F.silu(gate.float()).view(y.shape)


@conv_ssd_scan.fake
def _(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    gate: Tensor | None,
    conv_state: Tensor,
    ssm_state: Tensor,
    cu_q: Tensor,
    kv_len: Tensor,
    state_slot: Tensor,
    activation: str | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    log_rates: bool = False,
) -> Tensor:
    shape = (x.shape[0], ssm_state.shape[1], ssm_state.shape[2])
    return x.new_empty(shape, dtype=torch.float32)


def split_scan(mixed: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H, P], B and C [T, G, N] of [T, H P + 2 G N]."""
    heads, width, entries = ssm_state.shape[1:]
    groups = (mixed.shape[1] - heads * width) // 2
    x, B, C = mixed.split([heads * width, groups, groups], -1)
    return (
        x.unflatten(1, (heads, width)),
        B.unflatten(1, (-1, entries)),
        C.unflatten(1, (-1, entries)),
    )
