"""A decoding step of a gated delta layer: convolution, gates, delta rule and norm of one head."""

import triton
import triton.language as tl

from ..gate.activation_kernel import softplus
from .conv_step_kernel import convolved, is_last, keep_inputs, old_inputs, taps_of
from .delta_kernel import unit_length
from .packed_kernel import sequence_span


@triton.jit
def gates(g, beta, a_log, dt_bias, HAS_GATES: tl.constexpr, NARROW: tl.constexpr):
    """The logarithm of the decay and the strength of the update: as `delta_gates`."""
    if HAS_GATES:
        g = -tl.exp(a_log.to(tl.float32)) * softplus(g + dt_bias.to(tl.float32))
        beta = tl.sigmoid(beta).to(NARROW).to(tl.float32)
    return g, beta


@triton.jit
def norm_and_gate(y, gate, weight, eps, WIDTH: tl.constexpr, NARROW: tl.constexpr,
                  WEIGHT_TYPE: tl.constexpr):  # fmt: skip
    """As `gated_norm`: y and gate float32 [.., D], rounded where the reference rounds."""
    axis: tl.constexpr = len(y.shape) - 1
    y = y.to(NARROW).to(tl.float32)
    mean = tl.sum(y * y, axis=axis, keep_dims=True) / WIDTH
    y = (y * tl.rsqrt(mean + eps)).to(NARROW).to(tl.float32) * weight
    if WEIGHT_TYPE == NARROW:
        y = y.to(NARROW).to(tl.float32)
    return y * (gate * tl.sigmoid(gate))


@triton.jit(do_not_specialize=["sequences", "eps"])
def conv_delta_kernel(
    x, conv_weight, conv_bias, g, beta, a_log, dt_bias, gate, norm_weight, conv_state, state,
    cu_q, kv_len, state_slot, out, arrivals, sequences, x_stride, g_stride, beta_stride,
    gate_stride, conv_stride, slot_stride, scale, eps,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, BLOCK: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_GATES: tl.constexpr, HAS_NORM: tl.constexpr,
    NORMALIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per sequence, head and BLOCK of its VALUES; all of them if there is a norm.

    There are as many rows as sequences; those past the last token become zeros. Programs that
    share keys count themselves in `arrivals`: the last one to have read the old inputs of the
    convolution overwrites them.
    """
    blocks: tl.constexpr = (VALUES + BLOCK - 1) // BLOCK
    sharing: tl.constexpr = HEADS // GROUPS * blocks
    narrow: tl.constexpr = out.dtype.element_ty
    head = tl.program_id(0) // blocks
    sequence = tl.program_id(1)
    group = head // (HEADS // GROUPS)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_KEYS)
    inside = channel < VALUES
    held = key < KEYS
    # Staged by the host, as are states of earlier steps: there before the kernel in front ends.
    start, stop, has_past, slot = sequence_span(cu_q, kv_len, state_slot, sequence)
    place = state + slot * slot_stride + head * KEYS * VALUES
    place = place + key[:, None] * VALUES + channel[None, :]
    mask = held[:, None] & inside[None, :]
    kept = tl.load(place, mask=mask & has_past, other=0.0)
    end = tl.load(cu_q + sequences)
    q_column = group * KEYS + key
    k_column = q_column + GROUPS * KEYS
    v_column = 2 * GROUPS * KEYS + head * VALUES + channel
    row = conv_state + slot * conv_stride
    q_mask = held & has_past
    v_mask = inside & has_past
    q1, q2, q3 = old_inputs(row, q_column, q_mask, TAPS)
    k1, k2, k3 = old_inputs(row, k_column, q_mask, TAPS)
    v1, v2, v3 = old_inputs(row, v_column, v_mask, TAPS)
    q_taps = taps_of(conv_weight, q_column, held, TAPS)
    k_taps = taps_of(conv_weight, k_column, held, TAPS)
    v_taps = taps_of(conv_weight, v_column, inside, TAPS)
    factor = tl.zeros([BLOCK], tl.float32)
    if HAS_NORM:
        factor = tl.load(norm_weight + channel, mask=inside, other=0.0).to(tl.float32)
    log_rate = tl.load(a_log + head) if HAS_GATES else 0.0
    bias = tl.load(dt_bias + head) if HAS_GATES else 0.0
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    column = head * VALUES + channel
    token = start
    while token < stop:
        at = token.to(tl.int64)
        q0 = tl.load(x + at * x_stride + q_column, mask=held, other=0.0).to(tl.float32)
        k0 = tl.load(x + at * x_stride + k_column, mask=held, other=0.0).to(tl.float32)
        v0 = tl.load(x + at * x_stride + v_column, mask=inside, other=0.0).to(tl.float32)
        opening = v0
        if HAS_NORM:
            opening = tl.load(gate + at * gate_stride + column, mask=inside, other=0.0)
            opening = opening.to(tl.float32)
        decay = tl.load(g + at * g_stride + head).to(tl.float32)
        strength = tl.load(beta + at * beta_stride + head).to(tl.float32)
        decay, strength = gates(decay, strength, log_rate, bias, HAS_GATES, beta.dtype.element_ty)
        reads = convolved(q0, q1, q2, q3, q_taps, conv_bias, q_column, held, conv_weight,
                          HAS_BIAS, ACTIVATION, narrow)  # fmt: skip
        writes = convolved(k0, k1, k2, k3, k_taps, conv_bias, k_column, held, conv_weight,
                           HAS_BIAS, ACTIVATION, narrow)  # fmt: skip
        value = convolved(v0, v1, v2, v3, v_taps, conv_bias, v_column, inside, conv_weight,
                          HAS_BIAS, ACTIVATION, narrow)  # fmt: skip
        reads = unit_length(reads, NORMALIZE) * scale
        writes = unit_length(writes, NORMALIZE)
        # q (d S + k c) is d (q S) + (q k) c: both sums over keys are of the state as it was.
        decay = tl.exp(decay)
        predicted = tl.sum(kept * writes[:, None], axis=0)
        seen = tl.sum(kept * reads[:, None], axis=0)
        correction = (value - decay * predicted) * strength
        result = decay * seen + tl.sum(reads * writes, axis=0) * correction
        kept = kept * decay + writes[:, None] * correction[None, :]
        if HAS_NORM:
            result = norm_and_gate(result, opening, factor, eps, VALUES, narrow,
                                   norm_weight.dtype.element_ty)  # fmt: skip
        tl.store(out + at * (HEADS * VALUES) + column, result.to(narrow), mask=inside)
        q3, q2, q1 = q2, q1, q0
        k3, k2, k1 = k2, k1, k0
        v3, v2, v1 = v2, v1, v0
        token += 1

    tl.store(place, kept, mask=mask & (stop > start))
    keep_inputs(row, v_column, inside & (stop > start), v1, v2, v3, TAPS)
    last = stop > start
    if sharing > 1:
        last = last & is_last(arrivals + sequence * GROUPS + group, sharing)
    keep_inputs(row, q_column, held & last, q1, q2, q3, TAPS)
    keep_inputs(row, k_column, held & last, k1, k2, k3, TAPS)
    nothing = tl.zeros([BLOCK], tl.float32).to(narrow)
    place = out + sequence.to(tl.int64) * (HEADS * VALUES) + column
    tl.store(place, nothing, mask=inside & (sequence >= end))


@triton.jit(do_not_specialize=["tokens"])
def delta_gates_kernel(
    a, b, a_log, dt_bias, g, beta, tokens, a_stride, b_stride,
    HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """a, b [tokens, HEADS] to g float32 and beta, each [tokens, HEADS]; BLOCK rows a program."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    head = tl.arange(0, BLOCK_HEADS)[None, :]
    mask = (row < tokens) & (head < HEADS)
    rate = tl.load(a_log + head, mask=head < HEADS, other=0.0)
    bias = tl.load(dt_bias + head, mask=head < HEADS, other=0.0)
    decay = tl.load(a + row * a_stride + head, mask=mask, other=0.0).to(tl.float32)
    strength = tl.load(b + row * b_stride + head, mask=mask, other=0.0).to(tl.float32)
    decay, strength = gates(decay, strength, rate, bias, True, beta.dtype.element_ty)
    tl.store(g + row * HEADS + head, decay, mask=mask)
    tl.store(beta + row * HEADS + head, strength.to(beta.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "eps"])
def gated_norm_kernel(
    y, gate, weight, out, rows, gate_stride, eps,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y, out [rows, WIDTH], gate [rows / HEADS, HEADS * WIDTH]; BLOCK rows a program."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    mask = (row < rows) & (column < WIDTH)
    value = tl.load(y + row * WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    opening = row // HEADS * gate_stride + row % HEADS * WIDTH + column
    opening = tl.load(gate + opening, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    value = norm_and_gate(value, opening, factor, eps, WIDTH, out.dtype.element_ty,
                          weight.dtype.element_ty)  # fmt: skip
    tl.store(out + row * WIDTH + column, value.to(out.dtype.element_ty), mask=mask)
