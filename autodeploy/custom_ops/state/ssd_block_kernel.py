"""State-space duality scan of long runs of tokens: a block of tokens is three matrix products."""

import triton
import triton.language as tl

from .packed_kernel import sequence_span
from .ssd_kernel import rate_of, time_step


@triton.jit(do_not_specialize=["dt_min", "dt_max"])
def ssd_block_kernel(
    x, dt, A, B, C, D, dt_bias, state, cu_q, kv_len, state_slot, out,
    x_stride, dt_stride, b_stride, c_stride, slot_stride, dt_min, dt_max,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, STATE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_STATE: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    LEAST_TOKENS: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, LOG_RATES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per sequence of LEAST_TOKENS or more, head and BLOCK of the head's WIDTH."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    entry = tl.arange(0, BLOCK_STATE)
    inside = channel < WIDTH
    held = entry < STATE
    mask = inside[:, None] & held[None, :]
    rate = rate_of(A + head, LOG_RATES)
    bias = tl.load(dt_bias + head) if HAS_BIAS else 0.0
    skip = tl.load(D + head).to(tl.float32) if HAS_D else 0.0
    start, stop, has_past, slot = sequence_span(cu_q, kv_len, state_slot, tl.program_id(1))
    mine = stop - start >= LEAST_TOKENS
    place = state + slot * slot_stride + head * WIDTH * STATE
    place = place + channel[:, None] * STATE + entry[None, :]
    kept = tl.load(place, mask=mask & has_past & mine, other=0.0)

    group = head // (HEADS // GROUPS) * STATE
    column = head * WIDTH + channel
    index = tl.arange(0, BLOCK_TOKENS)
    earlier = index[:, None] >= index[None, :]
    first = tl.where(mine, start, stop)
    while first < stop:
        row = (first + index).to(tl.int64)
        valid = first + index < stop
        step = tl.load(dt + row * dt_stride + head, mask=valid, other=0.0)
        step = time_step(step, bias, dt_min, dt_max, HAS_BIAS, SOFTPLUS, dt.dtype.element_ty)
        step = tl.where(valid, step, 0.0)
        since_start = tl.cumsum(step * rate, axis=0)
        whole = tl.sum(step * rate, axis=0)
        wide = valid[:, None] & inside[None, :]
        value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=wide, other=0.0)
        value = value.to(tl.float32)
        vectors = valid[:, None] & held[None, :]
        entries = group + entry[None, :]
        writes = tl.load(B + row[:, None] * b_stride + entries, mask=vectors, other=0.0)
        reads = tl.load(C + row[:, None] * c_stride + entries, mask=vectors, other=0.0)
        writes, reads = writes.to(tl.float32), reads.to(tl.float32)

        scores = tl.dot(reads, tl.trans(writes), input_precision=PRECISION)
        # Masked before exp: from a later token to an earlier one the decay would overflow.
        between = tl.where(earlier, since_start[:, None] - since_start[None, :], -1e30)
        inputs = value * step[:, None]
        result = tl.dot(scores * tl.exp(between), inputs, input_precision=PRECISION)
        decayed = reads * tl.exp(since_start)[:, None]
        result = tl.dot(decayed, tl.trans(kept), acc=result, input_precision=PRECISION)
        result += skip * value
        until_end = writes * tl.exp(whole - since_start)[:, None]
        added = tl.dot(tl.trans(inputs), until_end, input_precision=PRECISION)
        kept = kept * tl.exp(whole) + added
        target = out + row[:, None] * (HEADS * WIDTH) + column[None, :]
        tl.store(target, result, mask=wide)
        first += BLOCK_TOKENS
    tl.store(place, kept, mask=mask & mine)
