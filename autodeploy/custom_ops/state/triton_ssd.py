"""cached_ssd_scan in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gpu
from ..op import Choice
from .packed import FLOATS, check_rows, launch_options, new_output, power_of_two, whole_rows
from .ssd_scan import cached_ssd_scan

# Numbers of the state that one program holds.
_TILE = 4096
# Sequences with more new tokens than this are scanned in blocks of tokens.
_STEPS = 8
_BLOCK_TOKENS = 64
_BLOCK_WIDTH = 32
_BLOCK_WARPS = 8
_GATE_BLOCK = 1024
# Largest state for which a block of tokens fits next to it.
_BLOCK_STATE = 256


def _applies(choice: Choice) -> bool:
    if not gpu.runs_triton(choice.device):
        return False
    dtypes = {choice.args[name].dtype for name in ("x", "dt", "A", "B", "C")}
    return dtypes <= set(FLOATS) and int(choice.args["B"].shape[-1]) <= 1024


@cached_ssd_scan.implement("triton", when=_applies, priority=10, capturable=True)
def scan_heads(
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
    tile: int = _TILE,
    num_warps: int = 4,
    gate: Tensor | None = None,
    log_rates: bool = False,
) -> Tensor:
    """As `cached_ssd_scan`; N at most 1024. gate and log_rates: as for `conv_ssd_scan`."""
    from .ssd_block_kernel import ssd_block_kernel
    from .ssd_kernel import ssd_step_kernel

    tokens, heads, width = x.shape
    sequences, (groups, entries) = len(state_slot), B.shape[1:]
    x, dt, B, C = (whole_rows(tensor) for tensor in (x, dt, B, C))
    state = check_rows(ssm_state)
    out = new_output(x, (tokens, heads, width), torch.float32, sequences)
    operands = (x, dt, A, B, C, A if D is None else D, A if dt_bias is None else dt_bias, state,
                cu_q, kv_len, state_slot, out)  # fmt: skip
    scalars = (x.stride(0), dt.stride(0), B.stride(0), C.stride(0), state.stride(0),
               float(dt_min), float(dt_max))  # fmt: skip
    block_state = power_of_two(entries)
    form = {
        "HEADS": heads, "GROUPS": groups, "WIDTH": width, "STATE": entries, "HAS_D": D is not None,
        "HAS_BIAS": dt_bias is not None, "SOFTPLUS": dt_softplus, "LOG_RATES": log_rates,
    } | launch_options()  # fmt: skip
    block = min(power_of_two(width), max(1, tile // block_state))
    # As many rows as sequences is decoding; a longer sequence among empty ones goes this way too.
    decoding = tokens == sequences or block_state > _BLOCK_STATE
    ssd_step_kernel[(heads * -(-width // block), sequences)](
        *operands, sequences, *scalars, BLOCK=block, BLOCK_STATE=block_state,
        MOST_TOKENS=1 << 30 if decoding else _STEPS, FILL=tokens == sequences,
        num_warps=num_warps, **form,
    )  # fmt: skip
    if not decoding:
        block = min(_BLOCK_WIDTH, max(16, power_of_two(width)))
        exact = x.dtype is torch.float32
        ssd_block_kernel[(heads * -(-width // block), sequences)](
            *operands, *scalars, BLOCK=block, BLOCK_STATE=max(16, block_state),
            BLOCK_TOKENS=16 if exact else _BLOCK_TOKENS, LEAST_TOKENS=_STEPS + 1,
            PRECISION="ieee" if exact else "tf32", num_warps=_BLOCK_WARPS, **form,
        )  # fmt: skip
    if gate is not None and tokens:
        _open(out.view(tokens, heads * width), whole_rows(gate))
    return out


def _open(out: Tensor, gate: Tensor) -> None:
    """out [T, N] float32 times silu of gate [T, N], in place."""
    from .ssd_kernel import gate_rows_kernel

    tokens, width = out.shape
    gate_rows_kernel[(tokens, -(-width // _GATE_BLOCK))](
        out, gate, width, gate.stride(0), BLOCK=_GATE_BLOCK, num_warps=4, **launch_options()
    )
