"""Causal depthwise convolution: kernels for a step of few tokens, for many, and for the states."""

import triton
import triton.language as tl

from ..gate.activation_kernel import activate
from .packed_kernel import sequence_of, sequence_span


@triton.jit
def _inputs(x, x_stride, row, position, start, has_past, column, mask, TAPS: tl.constexpr):
    """Inputs at token `position`; before `start` those of the cache's row. Zeros without a past.

    Operands broadcast against each other; `row` points to the state of the sequence.
    """
    new = tl.load(x + position.to(tl.int64) * x_stride + column,
                  mask=mask & (position >= start), other=0.0)  # fmt: skip
    place = position - start + (TAPS - 1)
    old = tl.load(row + column * (TAPS - 1) + place,
                  mask=mask & has_past & (position < start) & (place >= 0), other=0.0)  # fmt: skip
    return tl.where(position >= start, new, old)


@triton.jit
def finish_total(
    total, bias, column, inside, weight, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr
):
    """Bias and activation, rounded where the reference rounds."""
    if HAS_BIAS:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    narrow = weight.dtype.element_ty
    rounded = total.to(narrow).to(tl.float32)
    return activate(rounded, ACTIVATION, narrow).to(narrow).to(tl.float32)


@triton.jit(do_not_specialize=["sequences"])
def conv_step_kernel(
    x, weight, bias, state, cu_q, kv_len, state_slot, out, sequences, x_stride, slot_stride,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, BLOCK_TAPS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, WITH_TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per sequence and block of channels: its tokens in turn, then its new state.

    WITH_TOKENS: outputs too; then there are as many rows as sequences. Otherwise states only.
    """
    sequence = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < CHANNELS
    tap = tl.arange(0, BLOCK_TAPS)
    mask = inside[:, None] & (tap < TAPS)[None, :]
    taps = tl.load(weight + column[:, None] * TAPS + tap[None, :], mask=mask, other=0.0)
    taps = taps.to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    start, stop, has_past, slot = sequence_span(cu_q, kv_len, state_slot, sequence)
    row = state + slot * slot_stride
    if WITH_TOKENS:
        token = start
        while token < stop:
            position = token - (TAPS - 1) + tap[None, :]
            window = _inputs(
                x, x_stride, row, position, start, has_past, column[:, None], mask, TAPS
            )
            total = tl.sum(window.to(tl.float32) * taps, axis=1)
            result = finish_total(total, bias, column, inside, weight, HAS_BIAS, ACTIVATION)
            place = out + token.to(tl.int64) * CHANNELS + column
            tl.store(place, result.to(out.dtype.element_ty), mask=inside)
            token += 1
        past_end = sequence >= tl.load(cu_q + sequences)
        nothing = tl.zeros([BLOCK], tl.float32).to(out.dtype.element_ty)
        place = out + sequence.to(tl.int64) * CHANNELS + column
        tl.store(place, nothing, mask=inside & past_end)

    position = stop - (TAPS - 1) + tap[None, :]
    kept = mask & (tap < TAPS - 1)[None, :]
    latest = _inputs(x, x_stride, row, position, start, has_past, column[:, None], kept, TAPS)
    # What a thread reads of the old state another one may overwrite.
    tl.debug_barrier()
    place = row + column[:, None] * (TAPS - 1) + tap[None, :]
    tl.store(place, latest.to(state.dtype.element_ty), mask=kept & (stop > start))


@triton.jit(do_not_specialize=["tokens", "sequences"])
def conv_tokens_kernel(
    x, weight, bias, state, cu_q, kv_len, state_slot, out, tokens, sequences, x_stride, slot_stride,
    SEARCH_STEPS: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program per block of tokens, whatever their sequences, and block of channels."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < CHANNELS
    sequence = sequence_of(token, cu_q, sequences, SEARCH_STEPS)
    start, stop, has_past, slot = sequence_span(cu_q, kv_len, state_slot, sequence)
    row = state + (slot * slot_stride)[:, None]
    mask = (token < stop)[:, None] & inside[None, :]
    total = tl.zeros([BLOCK_TOKENS, BLOCK], tl.float32)
    for tap in tl.static_range(TAPS):
        position = (token - (TAPS - 1) + tap)[:, None]
        window = _inputs(
            x, x_stride, row, position, start[:, None], has_past[:, None], column[None, :], mask,
            TAPS,
        )  # fmt: skip
        factor = tl.load(weight + column * TAPS + tap, mask=inside, other=0.0).to(tl.float32)
        total += window.to(tl.float32) * factor[None, :]
    result = finish_total(
        total, bias, column[None, :], inside[None, :], weight, HAS_BIAS, ACTIVATION
    )
    result = tl.where(mask, result, 0.0)
    place = out + token.to(tl.int64)[:, None] * CHANNELS + column[None, :]
    written = (token < tokens)[:, None] & inside[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=written)
