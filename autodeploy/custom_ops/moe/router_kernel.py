"""Kernel of a router: one token's logits, its choice of experts, and on the way its normed row."""

import triton
import triton.language as tl

from ..linear.skinny_kernel import norm_scale


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


@triton.jit
def _choose(
    logits, index, weights, EXPERTS: tl.constexpr, CHOICES: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """As `route_kernel`, of one row that this launch wrote. An expert's place is the number of
    those ahead of it, all counted at once: k maxima in turn are a chain of k reductions."""
    own = tl.arange(0, BLOCK_EXPERTS)
    value = tl.load(logits + own, mask=own < EXPERTS, other=float("-inf"), cache_modifier=".cg").to(
        tl.float32
    )
    place = tl.zeros([BLOCK_EXPERTS], tl.int32)
    for chunk in tl.static_range(0, BLOCK_EXPERTS, CHUNK):
        other = chunk + tl.arange(0, CHUNK)
        theirs = tl.load(
            logits + other, mask=other < EXPERTS, other=float("-inf"), cache_modifier=".cg"
        ).to(tl.float32)
        equal = (theirs[None, :] == value[:, None]) & (other[None, :] < own[:, None])
        ahead = (theirs[None, :] > value[:, None]) | equal
        place += tl.sum(ahead.to(tl.int32), axis=1)
    share = tl.exp(value - tl.max(value, axis=0))
    chosen = (place < CHOICES) & (own < EXPERTS)
    if NORMALIZE:
        share = share / tl.sum(tl.where(chosen, share, 0.0), axis=0)
    else:
        share = share / tl.sum(share, axis=0)
    tl.store(index + place, own.to(tl.int64), mask=chosen)
    tl.store(weights + place, share.to(weights.dtype.element_ty), mask=chosen)


@triton.jit(do_not_specialize=["eps", "offset"])
def router_row_kernel(
    x, weight, bias, norm_weight, logits, normed, index, weights, arrivals, eps, offset,
    EXPERTS: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
    CHOICES: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr, NORM: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr,
    HAS_OFFSET: tl.constexpr, ROUNDED: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [1, K], weight [EXPERTS, K] -> logits [1, EXPERTS] and, if NORM, normed [1, K].

    One program makes BLOCK_E logits and norms the whole row for itself: BLOCK_K is K or more.
    CHOICES above 0: the last program to finish chooses, index and weights [1, CHOICES]. arrivals
    [1] is int32, zero, and left as zero.
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
    if CHOICES > 0:
        # All threads have stored before one of them says so.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals, 1, sem="acq_rel")
        if arrived == tl.num_programs(0) - 1:
            tl.store(arrivals, 0)
            _choose(
                logits, index, weights, EXPERTS, CHOICES, NORMALIZE, BLOCK_EXPERTS, CHUNK
            )  # fmt: skip
