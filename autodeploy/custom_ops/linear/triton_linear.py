"""fused_linear on a GPU: kernels of our own at few tokens, cuBLAS with separate ends at many.

On one H200 cuBLAS reads weights at 70 to 75 % of the memory's speed at few tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .. import gpu
from ..gate.triton_gate import gate_rows
from ..moe.gates import ACTIVATIONS, activate
from ..norm.triton_norm import rms_norm_rows
from ..op import Choice, OpError
from .add_linear import add_linear
from .add_linear_scaled import add_linear_scaled
from .dot_linear import NextNorm, can_leave, dot_linear, early_bytes
from .fused_linear import fused_linear
from .skinny_config import Tiling, scaled_ahead, tiling_of
from .wide_linear import can_be_wide, wide_linear

_DTYPES = (torch.bfloat16, torch.float16)


def _applies(choice: Choice) -> bool:
    if not gpu.runs_triton(choice.device):
        return False
    args = choice.args
    x, weight = args["x"], args["weight"]
    alike = [args[name] for name in ("bias", "norm_weight")]
    wide = (weight.dtype, torch.float32)
    return (
        weight.dtype in _DTYPES
        and x.dtype in (wide if args["norm"] else wide[:1])
        and all(t is None or t.dtype is weight.dtype for t in alike)
        and (args["residual"] is None or args["residual"].dtype in wide)
        # Loads of 16 bytes.
        and weight.dim() == 2
        and int(weight.shape[1]) % 8 == 0
        and weight.is_contiguous()
        and (args["activation"] in ACTIVATIONS or not args["activation"])
    )


def _leaves(choice: Choice) -> bool:
    weight = choice.args["next_weight"]
    alike = weight is None or weight.dtype is choice.args["weight"].dtype
    return alike and _applies(choice)


@fused_linear.implement("triton", when=_applies, priority=10, capturable=True)
def fused_linear_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm: bool = False,
    eps: float = 0.0,
    norm_offset: float = 0.0,
    cast_before_weight: bool = True,
    activation: str = "",
    gated: bool = False,
    residual: torch.Tensor | None = None,
    scaled: torch.Tensor | None = None,
    squares: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `fused_linear`; of one 2-byte dtype, but for x and the residual, which may be float32.

    scaled and squares, of `add_linear_scaled`, are read in place of x where they are filled and
    `dot_kernel` runs.
    """
    ahead = None if scaled is None or squares is None else (scaled, squares)
    return _product(
        x, weight, bias, norm_weight, norm, eps, norm_offset, cast_before_weight, activation,
        gated, residual, ahead=ahead,
    )  # fmt: skip


@add_linear.implement("triton", when=_applies, priority=10, capturable=True)
def add_linear_rows(
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm: bool = False,
    eps: float = 0.0,
    norm_offset: float = 0.0,
    cast_before_weight: bool = True,
    activation: str = "",
    gated: bool = False,
) -> None:
    """As `add_linear`; dtypes as for `fused_linear_rows`."""
    form = (norm_weight, norm, eps, norm_offset, cast_before_weight, activation, gated, residual)
    if residual.is_contiguous():
        _product(x, weight, bias, *form, in_place=True)
    else:
        residual.copy_(_product(x, weight, bias, *form))


@add_linear_scaled.implement("triton", when=_leaves, priority=10, capturable=True)
def add_linear_scaled_rows(
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm: bool = False,
    eps: float = 0.0,
    norm_offset: float = 0.0,
    cast_before_weight: bool = True,
    activation: str = "",
    gated: bool = False,
    next_weight: torch.Tensor | None = None,
    next_offset: float = 0.0,
    next_cast_before_weight: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `add_linear_scaled`; dtypes as for `fused_linear_rows`.

    What it returns is filled where `scaled_ahead` holds, and read nowhere else.
    """
    form = (norm_weight, norm, eps, norm_offset, cast_before_weight, activation, gated, residual)
    following = NextNorm.of(
        residual, weight.dtype, next_weight, next_offset, next_cast_before_weight
    )
    if residual.is_contiguous():
        _product(x, weight, bias, *form, in_place=True, following=following)
    else:
        residual.copy_(_product(x, weight, bias, *form, following=following))
    return following.scaled, following.squares


def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm: bool,
    eps: float,
    norm_offset: float,
    cast_before_weight: bool,
    activation: str,
    gated: bool,
    residual: torch.Tensor | None,
    in_place: bool = False,
    ahead: tuple[torch.Tensor, torch.Tensor] | None = None,
    following: NextNorm | None = None,
) -> torch.Tensor:
    """As `fused_linear`. in_place: the result overwrites the residual, which is contiguous.

    ahead: what `add_linear_scaled` returned with x. following: what is left for the norm to come.
    """
    rows, width = weight.shape
    tokens = x.numel() // width
    shape = (*x.shape[:-1], rows // 2 if gated else rows)
    if tokens == 0:
        return x.new_empty(shape, dtype=_result_dtype(weight, residual))
    ends = bool(activation) or residual is not None
    tiling = tiling_of(tokens, rows, width, gated, gpu.multiprocessors(), ends, norm)
    squares = None
    if norm and ahead is not None and scaled_ahead(tokens, width) and tiling.kernel == "dot":
        (x, squares), norm = ahead, False
    elif norm and tiling.kernel != "gemv":
        form = (norm_weight, eps, norm_offset, cast_before_weight)
        x, norm = rms_norm_rows(x, *form, dtype=weight.dtype), False
    x = x.reshape(tokens, width)
    if residual is not None:
        residual = residual.reshape(tokens, -1)
    # One object for both: cuBLAS copies a residual that is not the very tensor it writes.
    out = residual if in_place else None
    plain = residual is None or residual.dtype is weight.dtype
    leaves = following is not None and scaled_ahead(tokens, shape[-1])
    within = leaves and can_leave(tiling)
    if tiling.kernel == "wide" and plain and can_be_wide(x, weight):
        y = wide_linear(x, weight, bias, activation, gated, residual, tiling, out)
    elif tiling.kernel in ("cublas", "wide"):
        y = _with_cublas(x, weight, bias, activation, gated, residual, out)
    else:
        y = skinny_linear(
            x, weight, bias, norm_weight, norm, eps, norm_offset, cast_before_weight, activation,
            gated, residual, tiling, out, squares, following if within else None,
        )  # fmt: skip
    if following is not None and leaves and not within:
        following.fill(y)
    return y.view(shape)


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm: bool,
    eps: float,
    norm_offset: float,
    cast_before_weight: bool,
    activation: str,
    gated: bool,
    residual: torch.Tensor | None,
    tiling: Tiling,
    out: torch.Tensor | None = None,
    squares: torch.Tensor | None = None,
    following: NextNorm | None = None,
) -> torch.Tensor:
    """x [tokens, K] and residual [tokens, columns] on one kernel, with a given tiling.

    out: None, or what the result is written to, contiguous; it may be the residual. For
    `dot_kernel` only: squares: x has been multiplied by a norm's weight, and these are what
    `add_linear_scaled` returned with it. following: what the kernel is to leave for a norm.

    Raises:
        OpError: the tiling's kernel applies no norm, and one is asked for.
    """
    x = x.contiguous()
    tokens = x.shape[0]
    columns = weight.shape[0] // 2 if gated else weight.shape[0]
    if out is None:
        dtype = _result_dtype(weight, residual)
        out = torch.empty((tokens, columns), dtype=dtype, device=x.device)
    pdl = gpu.overlaps_launches()
    options: dict[str, Any] = {
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "ACTIVATION": activation or "linear",
        "GATED": gated,
        "PDL": pdl,
        "num_warps": tiling.warps,
    }
    if pdl:
        options["launch_pdl"] = True
    # An absent tensor is never read; any pointer stands for it.
    operands = (x, weight, weight if bias is None else bias)
    ends = (out if residual is None else residual.contiguous(), out)
    if tiling.kernel == "gemv":
        norm_form = {
            "NORM": norm,
            "HAS_NORM_WEIGHT": norm_weight is not None,
            "HAS_OFFSET": norm_offset != 0.0,
            "ROUNDED": cast_before_weight,
        }
        scale = weight if norm_weight is None else norm_weight
        _gemv((*operands, scale, *ends), eps, norm_offset, tiling, {**norm_form, **options})
    elif norm:
        raise OpError("dot_kernel takes rows that are normed already")
    else:
        dot_linear((*operands, *ends), tiling, options, squares, eps, following)
    return out


def _gemv(
    operands: tuple[torch.Tensor, ...], eps: float, norm_offset: float, tiling: Tiling,
    options: dict[str, Any],
) -> None:  # fmt: skip
    """operands: as of `gemv_kernel`."""
    from .gemv_kernel import gemv_kernel

    x, weight, *_, out = operands
    tokens, columns = out.shape
    gemv_kernel[(-(-columns // tiling.block_n),)](
        *operands, columns, eps, norm_offset,
        K=x.shape[1], TOKENS=tokens, BLOCK_N=tiling.block_n, BLOCK_K=tiling.block_k,
        EARLY=early_bytes(tiling, weight, 1), **options,
    )  # fmt: skip


def _result_dtype(weight: torch.Tensor, residual: torch.Tensor | None) -> torch.dtype:
    return weight.dtype if residual is None else torch.promote_types(weight.dtype, residual.dtype)


def _with_cublas(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    gated: bool,
    residual: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [tokens, K] and residual [tokens, columns] on cuBLAS. out: as for `skinny_linear`."""
    plain = bias is None and not gated and not activation
    if residual is not None and plain and residual.dtype is x.dtype:
        return torch.addmm(residual, x, weight.t(), out=out)
    y = F.linear(x, weight, bias)
    if gated:
        y = gate_rows(y, activation or "linear")
    elif activation:
        y = activate(y, activation)
    if residual is not None:
        return torch.add(residual, y, out=out)
    return y if out is None else out.copy_(y)
