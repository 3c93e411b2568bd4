"""Gated delta rules: one token after another, all keys and some values of a head in registers."""

import triton
import triton.language as tl

from .packed_kernel import sequence_span


@triton.jit
def unit_length(x, NORMALIZE: tl.constexpr):
    """x [Dk] float32, scaled to length 1 if NORMALIZE."""
    if NORMALIZE:
        x = x * tl.rsqrt(tl.sum(x * x, axis=0) + 1e-6)
    return x


@triton.jit(do_not_specialize=["sequences"])
def delta_step_kernel(
    q, k, v, g, beta, state, cu_q, kv_len, state_slot, out, sequences,
    q_stride, k_stride, v_stride, g_stride, beta_stride, slot_stride, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, BLOCK: tl.constexpr, PER_CHANNEL: tl.constexpr,
    NORMALIZE: tl.constexpr, MOST_TOKENS: tl.constexpr, FILL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per sequence of at most MOST_TOKENS, head and BLOCK of its VALUES.

    PER_CHANNEL: g has one decay per key channel, not one per head. FILL: there are as many rows as
    sequences; those past the last token become zeros.
    """
    blocks: tl.constexpr = (VALUES + BLOCK - 1) // BLOCK
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(0) // blocks
    sequence = tl.program_id(1)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_KEYS)
    inside = channel < VALUES
    held = key < KEYS
    mask = held[:, None] & inside[None, :]
    start, stop, has_past, slot = sequence_span(cu_q, kv_len, state_slot, sequence)
    mine = (stop > start) & (stop - start <= MOST_TOKENS)
    place = state + slot * slot_stride + head * KEYS * VALUES
    place = place + key[:, None] * VALUES + channel[None, :]
    kept = tl.load(place, mask=mask & has_past & mine, other=0.0)

    group = head // (HEADS // GROUPS)
    column = head * VALUES + channel
    token = tl.where(mine, start, stop)
    while token < stop:
        row = token.to(tl.int64)
        reads = tl.load(q + row * q_stride + group * KEYS + key, mask=held, other=0.0)
        reads = unit_length(reads.to(tl.float32), NORMALIZE) * scale
        writes = tl.load(k + row * k_stride + group * KEYS + key, mask=held, other=0.0)
        writes = unit_length(writes.to(tl.float32), NORMALIZE)
        value = tl.load(v + row * v_stride + column, mask=inside, other=0.0).to(tl.float32)
        strength = tl.load(beta + row * beta_stride + head).to(tl.float32)
        if PER_CHANNEL:
            decay = tl.load(g + row * g_stride + head * KEYS + key, mask=held, other=0.0)
            kept = kept * tl.exp(decay.to(tl.float32))[:, None]
        else:
            kept = kept * tl.exp(tl.load(g + row * g_stride + head).to(tl.float32))
        correction = (value - tl.sum(kept * writes[:, None], axis=0)) * strength
        kept = kept + writes[:, None] * correction[None, :]
        result = tl.sum(kept * reads[:, None], axis=0).to(out.dtype.element_ty)
        tl.store(out + row * (HEADS * VALUES) + column, result, mask=inside)
        token += 1
    tl.store(place, kept, mask=mask & mine)
    if FILL:
        past_end = sequence >= tl.load(cu_q + sequences)
        nothing = tl.zeros([BLOCK], tl.float32).to(out.dtype.element_ty)
        row = sequence.to(tl.int64)
        tl.store(out + row * (HEADS * VALUES) + column, nothing, mask=inside & past_end)
