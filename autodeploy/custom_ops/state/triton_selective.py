"""cached_selective_scan in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gpu
from ..op import Choice
from .packed import FLOATS, check_rows, launch_options, new_output, power_of_two, whole_rows
from .selective_scan import cached_selective_scan

# Numbers of the state that one program holds, decoding; and with many tokens in turn, where more
# and smaller programs hide each other's waits.
_TILE = 2048
_TILE_TOKENS = 512


def _applies(choice: Choice) -> bool:
    if not gpu.runs_triton(choice.device):
        return False
    dtypes = {choice.args[name].dtype for name in ("x", "dt", "A", "B", "C")}
    return dtypes <= set(FLOATS) and int(choice.args["A"].shape[-1]) <= 256


@cached_selective_scan.implement("triton", when=_applies, priority=10, capturable=True)
def scan_channels(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    ssm_state: Tensor,
    cu_q: Tensor,
    kv_len: Tensor,
    state_slot: Tensor,
    dt_softplus: bool = False,
) -> Tensor:
    """As `cached_selective_scan`; N at most 256."""
    from .selective_kernel import selective_step_kernel

    tokens, channels = x.shape
    sequences, entries = len(state_slot), A.shape[1]
    x, dt, B, C = (whole_rows(tensor) for tensor in (x, dt, B, C))
    A, state = A.contiguous(), check_rows(ssm_state)
    gate = x if z is None else whole_rows(z)
    dtype = x.dtype
    for other in (D, z):
        dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)
    out = new_output(x, (tokens, channels), dtype, sequences)
    decoding = tokens == sequences
    block_state = power_of_two(entries)
    block = max(16, (_TILE if decoding else _TILE_TOKENS) // block_state)
    block = min(power_of_two(channels), block)
    selective_step_kernel[(-(-channels // block), sequences)](
        x, dt, A, B, C, A if D is None else D, gate, A if dt_bias is None else dt_bias, state,
        cu_q, kv_len, state_slot, out, sequences, x.stride(0), dt.stride(0), B.stride(0),
        C.stride(0), gate.stride(0), state.stride(0), CHANNELS=channels, STATE=entries,
        BLOCK=block, BLOCK_STATE=block_state, HAS_D=D is not None, HAS_Z=z is not None,
        HAS_BIAS=dt_bias is not None, SOFTPLUS=dt_softplus, FILL=decoding,
        num_warps=4 if decoding else 1, **launch_options(),
    )  # fmt: skip
    return out
