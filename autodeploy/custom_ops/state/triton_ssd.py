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
) -> Tensor:
    """As `cached_ssd_scan`; N at most 1024."""
    from .ssd_kernel import ssd_step_kernel

    tokens, heads, width = x.shape
    sequences, (groups, entries) = len(state_slot), B.shape[1:]
    x, dt, B, C = (whole_rows(tensor) for tensor in (x, dt, B, C))
    state = check_rows(ssm_state)
    out = new_output(x, (tokens, heads, width), torch.float32, sequences)
    block_state = power_of_two(entries)
    block = min(power_of_two(width), max(1, tile // block_state))
    ssd_step_kernel[(heads * -(-width // block), sequences)](
        x, dt, A, B, C, A if D is None else D, A if dt_bias is None else dt_bias, state,
        cu_q, kv_len, state_slot, out, sequences, x.stride(0), dt.stride(0), B.stride(0),
        C.stride(0), state.stride(0), float(dt_min), float(dt_max), HEADS=heads, GROUPS=groups,
        WIDTH=width, STATE=entries, BLOCK=block, BLOCK_STATE=block_state, HAS_D=D is not None,
        HAS_BIAS=dt_bias is not None, SOFTPLUS=dt_softplus, FILL=tokens == sequences,
        num_warps=num_warps, **launch_options(),
    )  # fmt: skip
    return out
