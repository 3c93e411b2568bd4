"""Kernel of a router's product: logits of one token, and on the way its normed row."""

import triton
import triton.language as tl

from ..linear.gemv_kernel import norm_scale


@triton.jit
def _normed(
    value, inverse, norm_weight, column, offset, K: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr,
    HAS_OFFSET: tl.constexpr, ROUNDED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """value [M, columns] and inverse [M] -> normed rows in DTYPE, rounded as `rms_norm` rounds."""
    value = value * inverse[:, None]
    if HAS_NORM_WEIGHT:
        scale = norm_scale(norm_weight, column, offset, K, HAS_OFFSET, ROUNDED)
        if ROUNDED:
            value = value.to(DTYPE).to(tl.float32)
        value = value * scale[None, :]
    return value.to(DTYPE)


@triton.jit(do_not_specialize=["eps", "offset"])
def router_row_kernel(
    x, weight, bias, norm_weight, logits, normed, eps, offset,
    EXPERTS: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_OFFSET: tl.constexpr,
    ROUNDED: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [1, K], weight [EXPERTS, K] -> logits [1, EXPERTS] and, if NORM, normed [1, K].

    One program makes BLOCK_E logits and norms the whole row for itself: BLOCK_K is K or more.
    """
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    column = tl.arange(0, BLOCK_K)
    inside = column < K
    row = tl.minimum(expert, EXPERTS - 1)
    w = tl.load(weight + row[:, None] * K + column[None, :], mask=inside[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + column[None, :], mask=inside[None, :], other=0.0)
    if NORM:
        wide = value.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(wide * wide, axis=1) / K + eps)
        value = _normed(
            wide, inverse, norm_weight, column, offset, K, HAS_NORM_WEIGHT, HAS_OFFSET, ROUNDED,
            x.dtype.element_ty,
        )  # fmt: skip
        if tl.program_id(0) == 0:
            tl.store(normed + column[None, :], value, mask=inside[None, :])
    total = tl.sum(w.to(tl.float32) * value.to(tl.float32), axis=1)
    if HAS_BIAS:
        total += tl.load(bias + row).to(tl.float32)
    tl.store(logits + expert, total.to(logits.dtype.element_ty), mask=expert < EXPERTS)
