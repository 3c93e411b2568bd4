"""Triton kernels of rotary embeddings: turning heads, and the table of cosines and sines."""

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice


@triton.jit
def weighted(
    x, scale, weight, offset, WEIGHT: tl.constexpr, FIRST: tl.constexpr, DTYPE: tl.constexpr
):
    """x [BLOCK_H, N] float32 times scale [BLOCK_H, 1] and a weight, rounded to DTYPE, float32."""
    row = x * scale
    if WEIGHT:
        if FIRST:
            # What the model adds the offset to is rounded to the dtype of its weights.
            row = row.to(DTYPE).to(tl.float32) * (offset + weight).to(DTYPE).to(tl.float32)
        else:
            row = row * (offset + weight)
    return row.to(DTYPE).to(tl.float32)


@triton.jit
def _normed(x, scale, weight_ptr, at, kept, offset, WEIGHT: tl.constexpr, FIRST: tl.constexpr,
            DTYPE: tl.constexpr):  # fmt: skip
    """As `weighted`, by the weights at `at` where they are kept."""
    weight = x
    if WEIGHT:
        weight = tl.load(weight_ptr + at, mask=kept, other=0.0).to(tl.float32)
    return weighted(x, scale, weight, offset, WEIGHT, FIRST, DTYPE)


@triton.jit
def _turned(
    source, target, live, cos_ptr, sin_ptr, weight_ptr, eps, offset,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
    WEIGHT: tl.constexpr, FIRST: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Heads at source [BLOCK_H, 1], normalised and turned, to target [BLOCK_H, 1]; both D long.

    Pairs are held as two blocks, whichever of each head's first 2 * HALF numbers they are.
    """
    DTYPE: tl.constexpr = source.dtype.element_ty
    TABLE: tl.constexpr = cos_ptr.dtype.element_ty
    square = tl.zeros([BLOCK_H, 1], tl.float32)
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    turning = pair < HALF
    both = tl.arange(0, 2 * BLOCK_HALF)[None, :]
    within = live & (both < 2 * HALF)
    if HALF > 0:
        if INTERLEAVED:
            x = tl.load(source + both, mask=within, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(x, [BLOCK_H, BLOCK_HALF, 2]))
        else:
            a = tl.load(source + pair, mask=live & turning, other=0.0).to(tl.float32)
            b = tl.load(source + HALF + pair, mask=live & turning, other=0.0).to(tl.float32)
        if NORM:
            square += tl.sum(a * a + b * b, 1, keep_dims=True)
    rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    staying = rest < D
    if 2 * HALF < D:
        c = tl.load(source + rest, mask=live & staying, other=0.0).to(tl.float32)
        if NORM:
            square += tl.sum(c * c, 1, keep_dims=True)
    scale = square
    if NORM:
        scale = tl.rsqrt(square / D + eps)
    if 2 * HALF < D:
        if NORM:
            c = _normed(c, scale, weight_ptr, rest, staying, offset, WEIGHT, FIRST, DTYPE)
        tl.store(target + rest, c.to(DTYPE), mask=live & staying)
    if HALF > 0:
        STEP: tl.constexpr = 2 if INTERLEAVED else 1
        APART: tl.constexpr = 1 if INTERLEAVED else HALF
        if NORM:
            a = _normed(a, scale, weight_ptr, pair * STEP, turning, offset, WEIGHT, FIRST, DTYPE)
            b = _normed(
                b, scale, weight_ptr, pair * STEP + APART, turning, offset, WEIGHT, FIRST, DTYPE
            )
        cos_a = tl.load(cos_ptr + pair, mask=turning, other=0.0).to(tl.float32)
        sin_a = tl.load(sin_ptr + pair, mask=turning, other=0.0).to(tl.float32)
        if INTERLEAVED:
            cos_b, sin_b = cos_a, sin_a
        else:
            # The halves of a table may differ.
            cos_b = tl.load(cos_ptr + HALF + pair, mask=turning, other=0.0).to(tl.float32)
            sin_b = tl.load(sin_ptr + HALF + pair, mask=turning, other=0.0).to(tl.float32)
        # Each product is rounded before the sum, as torch does, to the wider dtype: the table's.
        left = (a * cos_a).to(TABLE).to(tl.float32) - (b * sin_a).to(TABLE).to(tl.float32)
        right = (b * cos_b).to(TABLE).to(tl.float32) + (a * sin_b).to(TABLE).to(tl.float32)
        if INTERLEAVED:
            y = tl.reshape(tl.join(left, right), [BLOCK_H, 2 * BLOCK_HALF])
            tl.store(target + both, y.to(DTYPE), mask=within)
        else:
            tl.store(target + pair, left.to(DTYPE), mask=live & turning)
            tl.store(target + HALF + pair, right.to(DTYPE), mask=live & turning)


@triton.jit
def turn_heads_kernel(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr, v_out_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr,
    slot_ptr, q_token, q_head, k_token, k_head, v_token, v_head, q_out_token, q_out_head,
    k_out_page, k_out_slot, k_out_head, v_out_page, v_out_slot, v_out_head, cos_token, sin_token,
    q_eps, k_eps, offset,
    HQ: tl.constexpr, HKV: tl.constexpr, HV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    Q_WEIGHT: tl.constexpr, K_WEIGHT: tl.constexpr, FIRST: tl.constexpr, PAGED: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_DV: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T * (query blocks + key blocks + value blocks)): some heads of one token.

    q [T, HQ, D], k [T, HKV, D], v [T, HV, DV], HV is HKV or 0; cos and sin [T, 2 * HALF]. With
    PAGED keys and values go to their slots, otherwise to the row of their token.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    Q_PARTS: tl.constexpr = (HQ + BLOCK_Q - 1) // BLOCK_Q
    K_PARTS: tl.constexpr = (HKV + BLOCK_KV - 1) // BLOCK_KV
    V_PARTS: tl.constexpr = (HV + BLOCK_KV - 1) // BLOCK_KV
    PARTS: tl.constexpr = Q_PARTS + K_PARTS + V_PARTS
    token = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    cos_row = cos_ptr + token * cos_token
    sin_row = sin_ptr + token * sin_token
    if part < Q_PARTS:
        q_index = part * BLOCK_Q + tl.arange(0, BLOCK_Q)[:, None]
        _turned(
            q_ptr + token * q_token + q_index * q_head,
            q_out_ptr + token * q_out_token + q_index * q_out_head, q_index < HQ, cos_row, sin_row,
            q_norm_ptr, q_eps, offset, D, HALF, INTERLEAVED, Q_NORM, Q_WEIGHT, FIRST, BLOCK_Q,
            BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        page = token
        inside = token * 0
        if PAGED:
            slot = tl.load(slot_ptr + token).to(tl.int64)
            page = slot // PAGE
            inside = slot % PAGE
        if part < Q_PARTS + K_PARTS:
            k_index = (part - Q_PARTS) * BLOCK_KV + tl.arange(0, BLOCK_KV)[:, None]
            _turned(
                k_ptr + token * k_token + k_index * k_head,
                k_out_ptr + page * k_out_page + inside * k_out_slot + k_index * k_out_head,
                k_index < HKV, cos_row, sin_row, k_norm_ptr, k_eps, offset, D, HALF, INTERLEAVED,
                K_NORM, K_WEIGHT, FIRST, BLOCK_KV, BLOCK_HALF, BLOCK_REST,
            )  # fmt: skip
        else:
            v_index = (part - Q_PARTS - K_PARTS) * BLOCK_KV + tl.arange(0, BLOCK_KV)[:, None]
            wide = tl.arange(0, BLOCK_DV)[None, :]
            kept = (v_index < HV) & (wide < DV)
            v = tl.load(v_ptr + token * v_token + v_index * v_head + wide, mask=kept)
            v_at = v_out_ptr + page * v_out_page + inside * v_out_slot + v_index * v_out_head
            tl.store(v_at + wide, v, mask=kept)


@triton.jit(do_not_specialize=["tokens"])
def rotary_table_kernel(
    position_ptr, frequency_ptr, cos_ptr, sin_ptr, tokens, scaling,
    F: tl.constexpr, COPIES: tl.constexpr, STEP: tl.constexpr, APART: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, LIBDEVICE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(T / BLOCK_T)): rows of cos and sin [T, COPIES * F].

    Frequency i is written at i * STEP, and again APART further on if there are two copies.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    position = tl.load(position_ptr + token, mask=token < tokens, other=0).to(tl.float32)
    pair = tl.arange(0, BLOCK_F)
    frequency = tl.load(frequency_ptr + pair, mask=pair < F, other=0.0).to(tl.float32)
    angle = position[:, None] * frequency[None, :]
    if LIBDEVICE:
        # Exact for angles of hundreds of thousands, and in the interpreter there is no such thing.
        cos = libdevice.cos(angle) * scaling
        sin = libdevice.sin(angle) * scaling
    else:
        cos = tl.cos(angle) * scaling
        sin = tl.sin(angle) * scaling
    kept = (token[:, None] < tokens) & (pair[None, :] < F)
    at = token.to(tl.int64)[:, None] * (COPIES * F) + pair[None, :] * STEP
    tl.store(cos_ptr + at, cos.to(cos_ptr.dtype.element_ty), mask=kept)
    tl.store(sin_ptr + at, sin.to(sin_ptr.dtype.element_ty), mask=kept)
    if COPIES == 2:
        tl.store(cos_ptr + at + APART, cos.to(cos_ptr.dtype.element_ty), mask=kept)
        tl.store(sin_ptr + at + APART, sin.to(sin_ptr.dtype.element_ty), mask=kept)
