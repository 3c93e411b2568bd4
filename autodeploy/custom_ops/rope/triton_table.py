"""rotary_table in Triton: one launch, where torch takes eight."""

from __future__ import annotations

import torch

from .. import gpu
from ..op import Choice
from .rotary_table import rotary_table

# Copies of a frequency in a row, where frequency i is, and how far on its copy is, in units of F
# and of 1.
_LAYOUTS = {"halves": (2, 1, 1, 0), "pairs": (2, 2, 0, 1), "once": (1, 1, 0, 0)}


def _applies(choice: Choice) -> bool:
    positions, frequencies = choice.args["position_ids"], choice.args["inv_freq"]
    return (
        gpu.runs_triton(choice.device)
        and positions.dim() == 2
        and positions.shape[0] == 1
        and frequencies.dim() == 1
        and frequencies.dtype.is_floating_point
        and frequencies.dtype is not torch.float64
        and choice.args["dtype"] in (torch.bfloat16, torch.float16, torch.float32)
    )


@rotary_table.implement("triton", when=_applies, priority=10, capturable=True)
def triton_table(
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    scaling: float,
    layout: str,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `rotary_table`; a batch of 1."""
    from .rotary_kernel import rotary_table_kernel

    tokens, frequencies = position_ids.shape[1], inv_freq.shape[0]
    copies, step, whole, one = _LAYOUTS[layout]
    cos = inv_freq.new_empty((1, tokens, copies * frequencies), dtype=dtype)
    sin = torch.empty_like(cos)
    if not tokens:
        return cos, sin
    block = 1 << (frequencies - 1).bit_length()
    # A row at a time while there are fewer rows than multiprocessors.
    rows = 1 if tokens <= 256 else max(1, 512 // block)
    pdl = gpu.overlaps_launches()
    rotary_table_kernel[(-(-tokens // rows),)](
        position_ids.contiguous(), inv_freq.contiguous(), cos, sin, tokens, scaling,
        F=frequencies, COPIES=copies, STEP=step, APART=whole * frequencies + one, BLOCK_T=rows,
        BLOCK_F=block, LIBDEVICE=not gpu.interpreted(), PDL=pdl, num_warps=2,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return cos, sin
