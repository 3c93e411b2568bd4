"""A product of some hundred tokens on `wide_kernel`."""

from __future__ import annotations

from typing import Any

import torch

from .. import gpu
from .arrivals import MAX_TILES, arrivals_of
from .skinny_config import Tiling

_CHUNK = 64


def can_be_wide(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether tiles of x [tokens, K] and weight [N, K] can come through TMA: 16-byte addresses.

    And whether places in the result fit 31 bits.
    """
    aligned = all(t.data_ptr() % 16 == 0 and t.is_contiguous() for t in (x, weight))
    return aligned and x.shape[0] * weight.shape[0] < 2**31


def wide_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    gated: bool,
    residual: torch.Tensor | None,
    tiling: Tiling,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [tokens, K] and residual [tokens, columns] -> [tokens, columns], with a given tiling.

    out: None, or what the result is written to, contiguous; it may be the residual.
    `can_be_wide` must hold for x and weight.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    from .wide_kernel import wide_kernel

    tokens, width = x.shape
    columns = weight.shape[0] // 2 if gated else weight.shape[0]
    if out is None:
        out = torch.empty((tokens, columns), dtype=x.dtype, device=x.device)
    block_m, block_n, block_k = tiling.block_m, tiling.block_n, tiling.block_k
    tiles = -(-columns // block_n) * -(-tokens // block_m)
    programs = min(tiling.programs or tiles, tiles * -(-width // block_k), MAX_TILES // 2)
    arrivals = arrivals_of(x.device)
    # Of one dtype whether or not it is used: no second kernel is compiled.
    scratch = arrivals.view(torch.float32)
    if tiles % programs:
        area = block_n * block_m * (2 if gated else 1)
        scratch = torch.empty(2 * programs * area, dtype=torch.float32, device=x.device)
    pdl = gpu.overlaps_launches()
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    # An absent tensor is never read; any pointer stands for it.
    wide_kernel[(programs,)](
        TensorDescriptor(x, [*x.shape], [width, 1], [block_m, block_k]),
        TensorDescriptor(weight, [*weight.shape], [width, 1], [block_n, block_k]),
        weight, weight if bias is None else bias,
        out if residual is None else residual.contiguous(), out, scratch, arrivals,
        tokens, columns,
        K=width, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP=tiling.group,
        CHUNK=min(_CHUNK, block_m), HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, ACTIVATION=activation or "linear", GATED=gated,
        EARLY=min(tiling.early, 2 * width) if pdl else 0, WIDE=gpu.interpreted(), PDL=pdl,
        num_warps=tiling.warps, num_stages=tiling.stages, **options,
    )  # fmt: skip
    return out
