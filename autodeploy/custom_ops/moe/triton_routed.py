"""routed in Triton: two launches for a single token, norm, product and choice apart for more.

On one H200, norm, product and choice for 128 experts of 2048: 3.6 us for one token; 1 us more if
the last program of the product chooses, instead of a launch. For 8 and 64 tokens 5.3 and 6.3, where
a norm and cuBLAS take 7.3 and 7.4; a kernel with the norm in it took 12.9 for 8.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .. import gpu
from ..norm.triton_norm import rms_norm_rows
from ..op import Choice
from .routed import routed
from .triton_route import MAX_CHOICES, MAX_EXPERTS, route_rows

_DTYPES = (torch.bfloat16, torch.float16)
# Numbers of a weight that one program of `router_row_kernel` holds, and the widest row it can.
_TILE, _WIDEST = 8192, 16384


def _applies(choice: Choice) -> bool:
    a = choice.args
    x, weight = a["x"], a["weight"]
    alike = [a[name] for name in ("weight", "bias", "norm_weight")]
    return (
        gpu.runs_triton(choice.device)
        and x.dtype in _DTYPES
        and all(t is None or t.dtype is x.dtype for t in alike)
        and a["dtype"] in (*_DTYPES, torch.float32)
        and weight.is_contiguous()
        # Loads of 16 bytes.
        and int(weight.shape[1]) % 8 == 0
        and int(weight.shape[1]) <= _WIDEST
        and int(a["gate"] or weight.shape[0]) <= MAX_EXPERTS
        and a["k"] + a["shared"] <= MAX_CHOICES
    )


@routed.implement("triton", when=_applies, priority=10, capturable=True)
def routed_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    k: int,
    normalize: bool,
    dtype: torch.dtype,
    shared: int = 0,
    gate: int = 0,
    bias: torch.Tensor | None = None,
    wide: bool = False,
    norm_weight: torch.Tensor | None = None,
    norm: bool = False,
    eps: float = 0.0,
    norm_offset: float = 0.0,
    cast_before_weight: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `routed`; of one 2-byte dtype, at most 512 experts and 32 choices."""
    tokens = x.shape[0]
    normed = x.new_empty((tokens if norm else 0, x.shape[1]))
    if tokens == 1:
        form = (norm_weight, norm, eps, norm_offset, cast_before_weight)
        logits = _single(x.contiguous(), weight, bias, wide, normed, *form)
    else:
        if norm:
            x = normed = rms_norm_rows(x, norm_weight, eps, norm_offset, cast_before_weight)
        logits = _product(x, weight, bias, wide)
    return (*route_rows(logits, k, normalize, dtype, shared, gate), normed)


def _product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wide: bool
) -> torch.Tensor:
    # Not above: products take their gates from this package.
    from ..linear.skinny_config import narrow
    from ..linear.triton_linear import skinny_linear

    tokens, (experts, width) = x.shape[0], weight.shape
    tiling = narrow(tokens, experts, width, gpu.multiprocessors())
    if tiling is not None and tokens > 0:
        dtype = torch.float32 if wide else x.dtype
        logits = torch.empty((tokens, experts), dtype=dtype, device=x.device)
        return skinny_linear(
            x, weight, bias, None, False, 0.0, 0.0, True, "", False, None, tiling, logits
        )
    if wide and x.is_cuda:
        logits = torch.mm(x, weight.t(), out_dtype=torch.float32)
        return logits if bias is None else logits + bias
    if wide:
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return F.linear(x, weight, bias)


def _single(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wide: bool,
    normed: torch.Tensor, norm_weight: torch.Tensor | None, norm: bool, eps: float,
    norm_offset: float, cast_before_weight: bool,
) -> torch.Tensor:  # fmt: skip
    """Logits [1, E]; if `norm`, of the row that it writes to `normed`."""
    from .router_kernel import router_row_kernel

    experts, width = weight.shape
    dtype = torch.float32 if wide else x.dtype
    logits = torch.empty((1, experts), dtype=dtype, device=x.device)
    pdl = gpu.overlaps_launches()
    options: dict[str, Any] = {
        "EXPERTS": experts,
        "K": width,
        "NORM": norm,
        "HAS_NORM_WEIGHT": norm_weight is not None,
        "HAS_OFFSET": norm_offset != 0.0,
        "ROUNDED": cast_before_weight,
        "HAS_BIAS": bias is not None,
        "PDL": pdl,
    }
    if pdl:
        options["launch_pdl"] = True
    # An absent tensor is never read; any pointer stands for it.
    operands = (
        x, weight, weight if bias is None else bias, weight if norm_weight is None else norm_weight,
        logits, normed if norm else logits,
    )  # fmt: skip
    whole = 1 << (width - 1).bit_length()
    block = max(1, _TILE // whole)
    router_row_kernel[(-(-experts // block),)](
        *operands, eps, norm_offset, BLOCK_E=block, BLOCK_K=whole,
        num_warps=8 if whole > _TILE else 4, **options,
    )  # fmt: skip
    return logits
