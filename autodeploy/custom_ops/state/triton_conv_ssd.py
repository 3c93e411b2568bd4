"""conv_ssd_scan in Triton: one launch for decoding, a few when there are more tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gpu
from ..linear.arrivals import MAX_TILES, arrivals_of
from ..op import Choice
from .causal_conv1d import ACTIVATIONS
from .conv_ssd import conv_ssd_scan, split_scan
from .packed import FLOATS, check_rows, launch_options, power_of_two, whole_rows
from .triton_conv import convolve
from .triton_ssd import scan_heads

_MOST_TAPS = 4
# Numbers of the state that one program holds.
_TILE = 2048
# Most heads of all sequences, a multiprocessor: with more, the launches apart are at the speed of
# memory and one is not. On an H200, 80 heads of 64 x 128: 4.4 us and 6.6; 8 x 80: 21 and 17.
_HEADS = 2


def _applies(choice: Choice) -> bool:
    if not gpu.runs_triton(choice.device):
        return False
    given = choice.args
    floats = ("x", "conv_weight", "dt", "A", "D", "dt_bias", "gate")
    dtypes = {given[name].dtype for name in floats if given[name] is not None}
    activation, taps = given["activation"], int(given["conv_weight"].shape[1])
    return (
        dtypes <= set(FLOATS)
        and (activation is None or activation in ACTIVATIONS)
        and 2 <= taps <= _MOST_TAPS
        and int(given["ssm_state"].shape[-1]) <= 1024
    )


@conv_ssd_scan.implement("triton", when=_applies, priority=10, capturable=True)
def scan_layer(
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
    tile: int = _TILE,
    num_warps: int = 4,
) -> Tensor:
    """As `conv_ssd_scan`; at most 4 taps, N at most 1024."""
    heads, width, entries = ssm_state.shape[1:]
    groups = (x.shape[1] - heads * width) // (2 * entries)
    sequences = len(state_slot)
    few = sequences * heads <= _HEADS * gpu.multiprocessors()
    if len(x) != sequences or not few or sequences * groups > MAX_TILES:
        mixed = convolve(
            x, conv_weight, conv_bias, conv_state, cu_q, kv_len, state_slot, activation
        )
        x, B, C = split_scan(mixed, ssm_state)
        return scan_heads(x, dt, A, B, C, D, dt_bias, ssm_state, cu_q, kv_len, state_slot,
                          dt_softplus, dt_min, dt_max, gate=gate, log_rates=log_rates)  # fmt: skip

    from .conv_ssd_kernel import conv_ssd_kernel

    x, dt, weight = whole_rows(x), whole_rows(dt), conv_weight.contiguous()
    opening = x if gate is None else whole_rows(gate)
    conv_state, state = check_rows(conv_state), check_rows(ssm_state)
    out = torch.empty((sequences, heads, width), dtype=torch.float32, device=x.device)
    block_state = power_of_two(entries)
    block = min(power_of_two(width), max(1, tile // block_state))
    options = launch_options()
    # An absent tensor is never read; any pointer stands for it.
    conv_ssd_kernel[(heads * -(-width // block), sequences)](
        x, weight, weight if conv_bias is None else conv_bias, dt, A, A if D is None else D,
        A if dt_bias is None else dt_bias, opening, conv_state, state, cu_q, kv_len, state_slot,
        out, arrivals_of(x.device), sequences, x.stride(0), dt.stride(0), opening.stride(0),
        conv_state.stride(0), state.stride(0), float(dt_min), float(dt_max), HEADS=heads,
        GROUPS=groups, WIDTH=width, STATE=entries, BLOCK=block, BLOCK_STATE=block_state,
        TAPS=weight.shape[1], HAS_CONV_BIAS=conv_bias is not None,
        ACTIVATION={"swish": "silu", None: "linear"}.get(activation, activation),
        LOG_RATES=log_rates, HAS_D=D is not None, HAS_BIAS=dt_bias is not None,
        SOFTPLUS=dt_softplus, HAS_GATE=gate is not None, num_warps=num_warps, **options,
    )  # fmt: skip
    return out
