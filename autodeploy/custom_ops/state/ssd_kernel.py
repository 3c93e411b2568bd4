"""State-space duality scan: one token after another, a tile of a head's state in registers."""

import triton
import triton.language as tl

from ..gate.activation_kernel import softplus
from .packed_kernel import sequence_span


@triton.jit
def time_step(
    dt, bias, dt_min, dt_max, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """The length of a time step in float32, rounded to DTYPE where the reference rounds."""
    length = dt.to(tl.float32)
    if HAS_BIAS:
        length = (length + bias.to(DTYPE).to(tl.float32)).to(DTYPE).to(tl.float32)
    if SOFTPLUS:
        length = softplus(length).to(DTYPE).to(tl.float32)
    return tl.minimum(tl.maximum(length, dt_min), dt_max).to(DTYPE).to(tl.float32)


@triton.jit
def rate_of(A, LOG_RATES: tl.constexpr):
    """How fast a state decays, of a pointer to it or to the logarithm of its negative."""
    rate = tl.load(A).to(tl.float32)
    if LOG_RATES:
        rate = -tl.exp(rate)
    return rate


@triton.jit
def silu(gate):
    """In float32."""
    gate = gate.to(tl.float32)
    return gate * tl.sigmoid(gate)


@triton.jit
def gate_rows_kernel(out, gate, width, gate_stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out [tokens, width] times silu of gate, in place. One program per row and BLOCK columns.

    A launch of its own where the scan is at the speed of memory: with the gate in it, 64 sequences
    of 80 heads of 64 x 128 took 92 us on an H200, without 81.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = out + row * width + column
    value = tl.load(place, mask=column < width)
    opening = tl.load(gate + row * gate_stride + column, mask=column < width)
    tl.store(place, value * silu(opening), mask=column < width)


@triton.jit(do_not_specialize=["sequences", "dt_min", "dt_max"])
def ssd_step_kernel(
    x, dt, A, B, C, D, dt_bias, state, cu_q, kv_len, state_slot, out, sequences,
    x_stride, dt_stride, b_stride, c_stride, slot_stride, dt_min, dt_max,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, STATE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_STATE: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, LOG_RATES: tl.constexpr, MOST_TOKENS: tl.constexpr, FILL: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program per sequence of at most MOST_TOKENS, head and BLOCK of the head's WIDTH.

    FILL: there are as many rows as sequences; those past the last token become zeros.
    """
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    head = tl.program_id(0) // blocks
    sequence = tl.program_id(1)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    entry = tl.arange(0, BLOCK_STATE)
    inside = channel < WIDTH
    held = entry < STATE
    mask = inside[:, None] & held[None, :]
    rate = rate_of(A + head, LOG_RATES)
    bias = tl.load(dt_bias + head) if HAS_BIAS else 0.0
    skip = tl.load(D + head).to(tl.float32) if HAS_D else 0.0
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    start, stop, has_past, slot = sequence_span(cu_q, kv_len, state_slot, sequence)
    mine = (stop > start) & (stop - start <= MOST_TOKENS)
    place = state + slot * slot_stride + head * WIDTH * STATE
    place = place + channel[:, None] * STATE + entry[None, :]
    kept = tl.load(place, mask=mask & has_past & mine, other=0.0)

    group = head // (HEADS // GROUPS)
    column = head * WIDTH + channel
    token = tl.where(mine, start, stop)
    while token < stop:
        row = token.to(tl.int64)
        step = time_step(tl.load(dt + row * dt_stride + head), bias, dt_min, dt_max,
                         HAS_BIAS, SOFTPLUS, dt.dtype.element_ty)  # fmt: skip
        value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        writes = tl.load(B + row * b_stride + group * STATE + entry, mask=held, other=0.0)
        reads = tl.load(C + row * c_stride + group * STATE + entry, mask=held, other=0.0)
        kept = kept * tl.exp(step * rate) + (value * step)[:, None] * writes.to(tl.float32)[None, :]
        result = tl.sum(kept * reads.to(tl.float32)[None, :], axis=1) + skip * value
        tl.store(out + row * (HEADS * WIDTH) + column, result, mask=inside)
        token += 1
    tl.store(place, kept, mask=mask & mine)
    if FILL:
        past_end = sequence >= tl.load(cu_q + sequences)
        nothing = tl.zeros([BLOCK], tl.float32)
        row = sequence.to(tl.int64)
        tl.store(out + row * (HEADS * WIDTH) + column, nothing, mask=inside & past_end)
