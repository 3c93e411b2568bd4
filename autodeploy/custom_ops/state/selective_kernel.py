"""Selective scan: one token after another, the states of some channels in registers."""

import triton
import triton.language as tl

from ..gate.activation_kernel import activate
from .packed_kernel import sequence_span
from .ssd_kernel import time_step


@triton.jit(do_not_specialize=["sequences"])
def selective_step_kernel(
    x, dt, A, B, C, D, z, dt_bias, state, cu_q, kv_len, state_slot, out, sequences,
    x_stride, dt_stride, b_stride, c_stride, z_stride, slot_stride,
    CHANNELS: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_STATE: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    FILL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per sequence and BLOCK of channels.

    FILL: there are as many rows as sequences; those past the last token become zeros.
    """
    sequence = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    entry = tl.arange(0, BLOCK_STATE)
    inside = channel < CHANNELS
    held = entry < STATE
    mask = inside[:, None] & held[None, :]
    rate = tl.load(A + channel[:, None] * STATE + entry[None, :], mask=mask, other=0.0)
    rate = rate.to(tl.float32)
    bias = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias + channel, mask=inside, other=0.0).to(tl.float32)
    skip = tl.zeros([BLOCK], tl.float32)
    if HAS_D:
        skip = tl.load(D + channel, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    start, stop, has_past, slot = sequence_span(cu_q, kv_len, state_slot, sequence)
    place = state + slot * slot_stride + channel[:, None] * STATE + entry[None, :]
    kept = tl.load(place, mask=mask & has_past, other=0.0)
    infinity = float("inf")
    token = start
    while token < stop:
        row = token.to(tl.int64)
        step = tl.load(dt + row * dt_stride + channel, mask=inside, other=0.0)
        step = time_step(step, bias, -infinity, infinity, HAS_BIAS, SOFTPLUS, dt.dtype.element_ty)
        value = tl.load(x + row * x_stride + channel, mask=inside, other=0.0).to(tl.float32)
        writes = tl.load(B + row * b_stride + entry, mask=held, other=0.0).to(tl.float32)
        reads = tl.load(C + row * c_stride + entry, mask=held, other=0.0).to(tl.float32)
        kept = kept * tl.exp(step[:, None] * rate) + (step * value)[:, None] * writes[None, :]
        result = tl.sum(kept * reads[None, :], axis=1) + skip * value
        if HAS_Z:
            gate = tl.load(z + row * z_stride + channel, mask=inside, other=0.0).to(tl.float32)
            narrow = z.dtype.element_ty
            result = result * activate(gate, "silu", narrow).to(narrow).to(tl.float32)
        tl.store(out + row * CHANNELS + channel, result.to(out.dtype.element_ty), mask=inside)
        token += 1
    tl.store(place, kept, mask=mask & (stop > start))
    if FILL:
        past_end = sequence >= tl.load(cu_q + sequences)
        nothing = tl.zeros([BLOCK], tl.float32).to(out.dtype.element_ty)
        row = sequence.to(tl.int64)
        tl.store(out + row * CHANNELS + channel, nothing, mask=inside & past_end)
