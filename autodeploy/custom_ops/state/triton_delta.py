"""cached_gated_delta_rule and cached_kimi_delta_attention in Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import gpu
from ..op import Choice
from .delta_rule import cached_gated_delta_rule, cached_kimi_delta_attention
from .packed import FLOATS, check_rows, launch_options, new_output, power_of_two, whole_rows

# Numbers of the state that one program holds.
_TILE = 4096
# Sequences with more new tokens than this go through windows of tokens, if the decay is per head.
_STEPS = 8
_WINDOW = 32
_WINDOW_VALUES = 16
_WINDOW_WARPS = 8


def _applies(choice: Choice) -> bool:
    if not gpu.runs_triton(choice.device):
        return False
    dtypes = {choice.args[name].dtype for name in ("q", "k", "v", "g", "beta")}
    return dtypes <= set(FLOATS) and int(choice.args["k"].shape[-1]) <= 512


@cached_gated_delta_rule.implement("triton", when=_applies, priority=10, capturable=True)
@cached_kimi_delta_attention.implement("triton", when=_applies, priority=10, capturable=True)
def mix_heads(
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
    tile: int = _TILE,
    num_warps: int = 4,
) -> Tensor:
    """As `cached_gated_delta_rule`, g [T, H] or [T, H, Dk]; Dk at most 512."""
    from .delta_kernel import delta_step_kernel

    tokens, heads, values = v.shape
    sequences, (groups, keys) = len(state_slot), k.shape[1:]
    q, k, v, g, beta = (whole_rows(tensor) for tensor in (q, k, v, g, beta))
    state = check_rows(delta_state)
    out = new_output(v, (tokens, heads, values), q.dtype, sequences)
    form = {
        "HEADS": heads, "GROUPS": groups, "KEYS": keys, "VALUES": values, "NORMALIZE": qk_l2norm,
    } | launch_options()  # fmt: skip
    operands = (q, k, v, g, beta, state, cu_q, kv_len, state_slot, out)
    block_keys = power_of_two(keys)
    block = min(power_of_two(values), max(8, tile // block_keys))
    # As many rows as sequences is decoding; a longer sequence among empty ones goes this way too.
    decoding = tokens == sequences or g.dim() == 3 or block_keys > 256
    delta_step_kernel[(heads * -(-values // block), sequences)](
        *operands, sequences, q.stride(0), k.stride(0), v.stride(0), g.stride(0), beta.stride(0),
        state.stride(0), keys**-0.5, BLOCK_KEYS=block_keys, BLOCK=block, PER_CHANNEL=g.dim() == 3,
        MOST_TOKENS=1 << 30 if decoding else _STEPS, FILL=tokens == sequences,
        num_warps=num_warps, **form,
    )  # fmt: skip
    if not decoding:
        _mix_windows(operands, sequences, form)
    return out


def _mix_windows(operands: tuple[Tensor, ...], sequences: int, form: dict[str, Any]) -> None:
    """The sequences of more than _STEPS tokens."""
    from .delta_block_kernel import delta_block_kernel, delta_solve_kernel

    q, k, v, g, beta, state, cu_q, kv_len, state_slot, out = operands
    tokens, heads, values = v.shape
    keys = k.shape[-1]
    exact = q.dtype is torch.float32
    length = 16 if exact else _WINDOW
    windows = -(-tokens // length)
    inverse = torch.empty((windows * length, heads, length), dtype=torch.float32, device=q.device)
    block_keys = max(16, power_of_two(keys))
    form = form | {"BLOCK_KEYS": block_keys, "BLOCK_TOKENS": length}
    form["PRECISION"] = "ieee" if exact else "tf32"
    solving = {name: value for name, value in form.items() if name != "VALUES"}
    delta_solve_kernel[(windows, heads)](
        k, g, beta, cu_q, inverse, sequences, k.stride(0), g.stride(0), beta.stride(0),
        SEARCH_STEPS=max(10, sequences.bit_length()), num_warps=4 if length > 32 else 1, **solving,
    )  # fmt: skip
    block = min(_WINDOW_VALUES, max(16, power_of_two(values)))
    delta_block_kernel[(heads * -(-values // block), sequences)](
        q, k, v, g, beta, inverse, state, cu_q, kv_len, state_slot, out, q.stride(0), k.stride(0),
        v.stride(0), g.stride(0), beta.stride(0), state.stride(0), keys**-0.5, BLOCK=block,
        LEAST_TOKENS=_STEPS + 1, num_warps=_WINDOW_WARPS, **form,
    )  # fmt: skip
