"""Kernels of a router's product: logits of few tokens, and on the way their normed rows."""

import triton
import triton.language as tl

from ..linear.skinny_kernel import norm_scale, prefetch


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


@triton.jit(do_not_specialize=["tokens", "eps", "offset"])
def router_rows_kernel(
    x, weight, bias, norm_weight, logits, normed, tokens, eps, offset,
    EXPERTS: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, NORM: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr,
    HAS_OFFSET: tl.constexpr, ROUNDED: tl.constexpr, HAS_BIAS: tl.constexpr, EARLY: tl.constexpr,
    WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [tokens, K], weight [EXPERTS, K] -> logits [tokens, EXPERTS] and, if NORM, normed.

    Program (i, j) makes BLOCK_E logits of BLOCK_M tokens. The norm's weight scales x, sums of
    squares are gathered on the way, and the finished sums are divided by the root; then the
    programs of the same tokens share the writing of normed rows. EARLY: bytes of each weight row
    that are asked for before the wait. WIDE: as in `dot_kernel`.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    present = (token < tokens)[:, None]
    k = tl.arange(0, BLOCK_K)
    row = tl.minimum(expert, EXPERTS - 1)
    if EARLY > 0:
        prefetch(weight, tl.program_id(0) * BLOCK_E, EXPERTS, K, BLOCK_E, EARLY)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    x_rows = x + token.to(tl.int64)[:, None] * K
    w_tile = weight + row[:, None] * K + k[None, :]
    total = tl.zeros((BLOCK_E, BLOCK_M), tl.float32)
    square = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        column = start + k
        inside = (column < K)[None, :]
        w = tl.load(w_tile + start, mask=inside, other=0.0)
        values = tl.load(x_rows + column[None, :], mask=present & inside, other=0.0)
        if NORM:
            wide = values.to(tl.float32)
            square += wide * wide
            if HAS_NORM_WEIGHT:
                scale = norm_scale(norm_weight, column, offset, K, HAS_OFFSET, ROUNDED)
                values = (wide * scale[None, :]).to(DTYPE)
        across = tl.trans(values)
        if WIDE:
            w = w.to(tl.float32)
            across = across.to(tl.float32)
        total = tl.dot(w, across, total)
    if NORM:
        inverse = tl.rsqrt(tl.sum(square, axis=1) / K + eps)
        total = total * inverse[None, :]
    if HAS_BIAS:
        total += tl.load(bias + row).to(tl.float32)[:, None]
    place = token.to(tl.int64)[None, :] * EXPERTS + expert[:, None]
    mask = (token < tokens)[None, :] & (expert < EXPERTS)[:, None]
    tl.store(logits + place, total.to(logits.dtype.element_ty), mask=mask)
    if NORM:
        for start in range(tl.program_id(0) * BLOCK_K, K, tl.num_programs(0) * BLOCK_K):
            column = start + k
            here = present & (column < K)[None, :]
            value = tl.load(x_rows + column[None, :], mask=here, other=0.0).to(tl.float32)
            value = _normed(
                value, inverse, norm_weight, column, offset, K, HAS_NORM_WEIGHT, HAS_OFFSET,
                ROUNDED, DTYPE,
            )  # fmt: skip
            tl.store(normed + token.to(tl.int64)[:, None] * K + column[None, :], value, mask=here)
