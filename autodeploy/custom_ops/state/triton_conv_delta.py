"""conv_delta_rule in Triton: one launch for decoding, a few when there are more tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gpu
from ..linear.arrivals import MAX_TILES, arrivals_of
from ..op import Choice
from .causal_conv1d import ACTIVATIONS
from .conv_delta import conv_delta_rule, split_heads
from .packed import FLOATS, check_rows, launch_options, power_of_two, whole_rows
from .triton_conv import convolve
from .triton_delta import mix_heads

_MOST_TAPS = 4
# Numbers of a head's state that one program holds: all of it where a norm needs all values.
_MOST_STATE = 256 * 128
_TILE = 4096
# Numbers that one program of the kernels around a prompt's recurrence works on.
_ROWS_TILE = 4096


def _applies(choice: Choice) -> bool:
    if not gpu.runs_triton(choice.device):
        return False
    given = choice.args
    floats = ("x", "conv_weight", "g", "beta", "a_log", "dt_bias", "gate", "norm_weight")
    dtypes = {given[name].dtype for name in floats if given[name] is not None}
    activation, taps = given["activation"], int(given["conv_weight"].shape[1])
    keys, values = (int(size) for size in given["delta_state"].shape[2:])
    return (
        dtypes <= set(FLOATS)
        and (activation is None or activation in ACTIVATIONS)
        and 2 <= taps <= _MOST_TAPS
        and keys <= 512
        and power_of_two(keys) * power_of_two(values) <= _MOST_STATE
    )


@conv_delta_rule.implement("triton", when=_applies, priority=10, capturable=True)
def delta_layer(
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
    num_warps: int = 4,
    tile: int = _TILE,
) -> Tensor:
    """As `conv_delta_rule`; at most 4 taps, 32768 numbers in the state of a head."""
    heads, keys, values = delta_state.shape[1:]
    groups = (x.shape[1] - heads * values) // (2 * keys)
    sequences = len(state_slot)
    if len(x) != sequences or sequences * groups > MAX_TILES:
        mixed = convolve(
            x, conv_weight, conv_bias, conv_state, cu_q, kv_len, state_slot, activation
        )
        if a_log is not None and dt_bias is not None:
            g, beta = _gates(g, beta, a_log, dt_bias)
        y = mix_heads(
            *split_heads(mixed, delta_state), g, beta, delta_state, cu_q, kv_len, state_slot,
            qk_l2norm,
        )  # fmt: skip
        return y if gate is None or norm_weight is None else _norm(y, gate, norm_weight, eps)

    from .conv_delta_kernel import conv_delta_kernel

    x, g, beta, weight = (whole_rows(t) for t in (x, g, beta, conv_weight.contiguous()))
    opening = x if gate is None else whole_rows(gate)
    conv_state, state = check_rows(conv_state), check_rows(delta_state)
    out = torch.empty((sequences, heads, values), dtype=x.dtype, device=x.device)
    block_keys, block = power_of_two(keys), power_of_two(values)
    if norm_weight is None:
        block = min(block, max(8, tile // block_keys))
    options = launch_options()
    # An absent tensor is never read; any pointer stands for it.
    conv_delta_kernel[(heads * -(-values // block), sequences)](
        x, weight, weight if conv_bias is None else conv_bias, g, beta,
        weight if a_log is None else a_log, weight if dt_bias is None else dt_bias, opening,
        weight if norm_weight is None else norm_weight, conv_state, state, cu_q, kv_len,
        state_slot, out, arrivals_of(x.device), sequences, x.stride(0), g.stride(0),
        beta.stride(0), opening.stride(0), conv_state.stride(0), state.stride(0), keys**-0.5, eps,
        HEADS=heads, GROUPS=groups, KEYS=keys, VALUES=values, BLOCK_KEYS=block_keys, BLOCK=block,
        TAPS=weight.shape[1], HAS_BIAS=conv_bias is not None,
        ACTIVATION={"swish": "silu", None: "linear"}.get(activation, activation),
        HAS_GATES=a_log is not None, HAS_NORM=norm_weight is not None, NORMALIZE=qk_l2norm,
        num_warps=num_warps, **options,
    )  # fmt: skip
    return out


def _gates(a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """As `conv_delta.delta_gates`."""
    from .conv_delta_kernel import delta_gates_kernel

    a, b = whole_rows(a), whole_rows(b)
    tokens, heads = a.shape
    g = torch.empty((tokens, heads), dtype=torch.float32, device=a.device)
    beta = torch.empty((tokens, heads), dtype=b.dtype, device=b.device)
    block_heads = power_of_two(heads)
    block = max(1, _ROWS_TILE // block_heads // 4)
    delta_gates_kernel[(-(-tokens // block),)](
        a, b, a_log, dt_bias, g, beta, tokens, a.stride(0), b.stride(0), HEADS=heads,
        BLOCK_HEADS=block_heads, BLOCK=block, **launch_options(),
    )  # fmt: skip
    return g, beta


def _norm(y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `conv_delta.gated_norm`: y [T, H, Dv], gate [T, H Dv]."""
    from .conv_delta_kernel import gated_norm_kernel

    tokens, heads, width = y.shape
    gate, out = whole_rows(gate), torch.empty_like(y)
    block_width = power_of_two(width)
    block = max(1, _ROWS_TILE // block_width)
    gated_norm_kernel[(-(-tokens * heads // block),)](
        y, gate, weight, out, tokens * heads, gate.stride(0), eps, HEADS=heads, WIDTH=width,
        BLOCK_WIDTH=block_width, BLOCK=block, **launch_options(),
    )  # fmt: skip
    return out
