"""A decoding step of a state-space layer: convolution, scan and gate of a part of one head."""

import triton
import triton.language as tl

from .conv_step_kernel import convolved, keep_inputs, old_inputs, taps_of
from .packed_kernel import sequence_span
from .ssd_kernel import rate_of, silu, time_step


@triton.jit(do_not_specialize=["sequences", "dt_min", "dt_max"])
def conv_ssd_kernel(
    x, conv_weight, conv_bias, dt, A, D, dt_bias, gate, conv_state, state, cu_q, kv_len,
    state_slot, out, arrivals, sequences, x_stride, dt_stride, gate_stride, conv_stride,
    slot_stride, dt_min, dt_max,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, STATE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_STATE: tl.constexpr, TAPS: tl.constexpr, HAS_CONV_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, LOG_RATES: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_GATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per sequence, head and BLOCK of the head's WIDTH.

    There are as many rows as sequences; those past the last token become zeros. Programs that
    share B and C count themselves in `arrivals`: the last one to have read the old inputs of the
    convolution overwrites them.
    """
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    sharing: tl.constexpr = HEADS // GROUPS * blocks
    narrow: tl.constexpr = x.dtype.element_ty
    head = tl.program_id(0) // blocks
    sequence = tl.program_id(1)
    group = head // (HEADS // GROUPS)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    entry = tl.arange(0, BLOCK_STATE)
    inside = channel < WIDTH
    held = entry < STATE
    # Staged by the host, as are states of earlier steps: there before the kernel in front ends.
    start, stop, has_past, slot = sequence_span(cu_q, kv_len, state_slot, sequence)
    place = state + slot * slot_stride + head * WIDTH * STATE
    place = place + channel[:, None] * STATE + entry[None, :]
    mask = inside[:, None] & held[None, :]
    kept = tl.load(place, mask=mask & has_past, other=0.0)
    column = head * WIDTH + channel
    b_column = HEADS * WIDTH + group * STATE + entry
    c_column = b_column + GROUPS * STATE
    row = conv_state + slot * conv_stride
    x_mask = inside & has_past
    b_mask = held & has_past
    x1, x2, x3 = old_inputs(row, column, x_mask, TAPS)
    b1, b2, b3 = old_inputs(row, b_column, b_mask, TAPS)
    c1, c2, c3 = old_inputs(row, c_column, b_mask, TAPS)
    x_taps = taps_of(conv_weight, column, inside, TAPS)
    b_taps = taps_of(conv_weight, b_column, held, TAPS)
    c_taps = taps_of(conv_weight, c_column, held, TAPS)
    rate = rate_of(A + head, LOG_RATES)
    bias = tl.load(dt_bias + head) if HAS_BIAS else 0.0
    skip = tl.load(D + head).to(tl.float32) if HAS_D else 0.0
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    last = stop > start
    if sharing > 1:
        # Every thread's loads of old inputs come before the count.
        tl.debug_barrier()
        count = tl.atomic_add(arrivals + sequence * GROUPS + group, 1)
        last = last & (count == sharing - 1)
        tl.store(arrivals + sequence * GROUPS + group, 0, mask=count == sharing - 1)

    token = start
    while token < stop:
        at = token.to(tl.int64)
        x0 = tl.load(x + at * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        b0 = tl.load(x + at * x_stride + b_column, mask=held, other=0.0).to(tl.float32)
        c0 = tl.load(x + at * x_stride + c_column, mask=held, other=0.0).to(tl.float32)
        step = tl.load(dt + at * dt_stride + head)
        opening = step
        if HAS_GATE:
            opening = tl.load(gate + at * gate_stride + column, mask=inside, other=0.0)
        step = time_step(step, bias, dt_min, dt_max, HAS_BIAS, SOFTPLUS, dt.dtype.element_ty)
        value = convolved(x0, x1, x2, x3, x_taps, conv_bias, column, inside, conv_weight,
                          HAS_CONV_BIAS, ACTIVATION, narrow)  # fmt: skip
        writes = convolved(b0, b1, b2, b3, b_taps, conv_bias, b_column, held, conv_weight,
                           HAS_CONV_BIAS, ACTIVATION, narrow)  # fmt: skip
        reads = convolved(c0, c1, c2, c3, c_taps, conv_bias, c_column, held, conv_weight,
                          HAS_CONV_BIAS, ACTIVATION, narrow)  # fmt: skip
        kept = kept * tl.exp(step * rate) + (value * step)[:, None] * writes[None, :]
        result = tl.sum(kept * reads[None, :], axis=1) + skip * value
        if HAS_GATE:
            result = result * silu(opening)
        tl.store(out + at * (HEADS * WIDTH) + column, result, mask=inside)
        x3, x2, x1 = x2, x1, x0
        b3, b2, b1 = b2, b1, b0
        c3, c2, c1 = c2, c1, c0
        token += 1

    tl.store(place, kept, mask=mask & (stop > start))
    keep_inputs(row, column, inside & (stop > start), x1, x2, x3, TAPS)
    keep_inputs(row, b_column, held & last, b1, b2, b3, TAPS)
    keep_inputs(row, c_column, held & last, c1, c2, c3, TAPS)
    past_end = sequence >= tl.load(cu_q + sequences)
    place = out + sequence.to(tl.int64) * (HEADS * WIDTH) + column
    tl.store(place, tl.zeros([BLOCK], tl.float32), mask=inside & past_end)
