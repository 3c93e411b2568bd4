"""Triton kernels of a decoding step's latent attention: rows are made where they are attended to.

A new token's row is normalised and turned in registers, goes from there into the scores and, from
one program of its last range, to its slot. No program reads a row that another one writes. Earlier
rows are of earlier steps. Asking for them before the wait for the kernel in front gains nothing.
See `latent_attention_kernel` for the two parts of a row.
"""

import triton
import triton.language as tl

from ..rope.rotary_kernel import weighted
from .latent_attention_kernel import _attend_rows
from .paged_attention_kernel import LOG2E, LOWEST, add_sink, lowest_seen, shape_scores
from .rotary_decode_kernel import _find_token, _load_heads, _load_turn, _turn


@triton.jit(
    do_not_specialize=[
        "table_stride", "slot_stride", "sequences", "splits", "least", "window", "chunk", "eps",
        "offset",
    ],
    do_not_specialize_on_alignment=["cu_q_ptr", "kv_len_ptr", "table_ptr", "slot_ptr"],
)  # fmt: skip
def rotary_latent_kernel(
    q_ptr, q_rest_ptr, latent_ptr, rest_ptr, cache_ptr, out_ptr, cu_q_ptr, kv_len_ptr, table_ptr,
    slot_ptr, cos_ptr, sin_ptr, norm_ptr, sinks_ptr, slopes_ptr, partial_ptr, stats_ptr, used_ptr,
    q_token, q_head, q_rest_token, q_rest_head, latent_token, rest_token, c_page, c_slot,
    table_stride, slot_stride, cos_token, sin_token, sequences, splits, least, scale, unit, softcap,
    window, chunk, eps, offset,
    PARTS: tl.constexpr, GROUP: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_MAIN: tl.constexpr,
    BLOCK_REST: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
    WEIGHT: tl.constexpr, FIRST: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T * PARTS * splits), T tokens of as many sequences: a range of one token's rows.

    q [T, H, MAIN] and q_rest [T, H, REST], not turned yet; latent [T, MAIN] and rest [T, REST]; H
    is PARTS * GROUP. Rows of earlier steps are cut into at most `splits` ranges of at least `least`
    blocks. SPLIT: there can be more than one range; each leaves its sums, and `used` [T, PARTS]
    says how many there are.
    """
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    TABLE: tl.constexpr = cos_ptr.dtype.element_ty
    program = tl.program_id(0)
    split = program % splits
    part = (program // splits) % PARTS
    token = program // (splits * PARTS)
    sequence, begin, end, known = _find_token(cu_q_ptr, kv_len_ptr, token, sequences)
    position = known - end + token
    low = lowest_seen(position, window, chunk, WINDOW, CHUNK)
    # Earlier steps wrote rows up to here.
    old = tl.maximum(known - (end - begin), low)
    blocks = tl.cdiv(old - low, BLOCK_N)
    each = tl.maximum(tl.cdiv(blocks, splits), least)
    used = tl.maximum(tl.cdiv(blocks, each), 1)
    if split >= used:
        return
    start = low + split * each * BLOCK_N
    stop = tl.minimum(start + each * BLOCK_N, old)
    # The last range also takes the rows of this step, and writes the token's own.
    last = split == used - 1
    table_ptr += tl.cast(sequence, tl.int64) * table_stride
    m = tl.arange(0, BLOCK_M)
    # Rows past the group repeat its last head and are not stored.
    head = part * GROUP + tl.minimum(m, GROUP - 1)
    d = tl.arange(0, BLOCK_MAIN)
    r = tl.arange(0, BLOCK_REST)[None, :]
    slope = tl.zeros([BLOCK_M], tl.float32)
    if ALIBI:
        slope = tl.load(slopes_ptr + head).to(tl.float32) * LOG2E
    weight = tl.zeros([BLOCK_MAIN], tl.float32)
    if WEIGHT:
        weight = tl.load(norm_ptr + d, mask=d < MAIN, other=0.0).to(tl.float32)
    slot = tl.load(slot_ptr + token * slot_stride).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    place = tl.cast(token, tl.int64)
    q_at = q_ptr + (place * q_token + head * q_head)[:, None] + d[None, :]
    q = tl.load(q_at, mask=(d < MAIN)[None, :], other=0.0)
    q_rest = _turned(
        q_rest_ptr + (place * q_rest_token + head * q_rest_head)[:, None],
        cos_ptr + place * cos_token, sin_ptr + place * sin_token, m[:, None], r, REST, HALF,
        INTERLEAVED, DTYPE, TABLE,
    )  # fmt: skip
    query = tl.zeros([BLOCK_M], tl.int32) + position
    acc = tl.zeros([BLOCK_M, BLOCK_MAIN], tl.float32)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc, top, total = _attend_rows(
        acc, top, total, q, q_rest, query, query, slope, start, stop, tl.maximum(stop - 1, 0),
        cache_ptr, table_ptr, c_page, c_slot, scale, unit, softcap, MAIN, REST, PAGE, BLOCK_N,
        BLOCK_MAIN, BLOCK_REST, False, SOFTCAP, ALIBI, PRECISION, True,
    )  # fmt: skip

    n = tl.arange(0, 16)
    first_new = tl.where(last, tl.maximum(begin, low - known + end), token + 1)
    # One round but for a sequence that brings many tokens.
    for first in tl.range(first_new, token + 1, 16, num_stages=1):
        # Rows past the token's own repeat it and are not seen.
        row = tl.minimum(first + n, token).to(tl.int64)
        c_at = latent_ptr + (row * latent_token)[:, None] + d[None, :]
        c = tl.load(c_at, mask=(d < MAIN)[None, :], other=0.0)
        if NORM:
            own = c.to(tl.float32)
            rms = tl.rsqrt(tl.sum(own * own, 1, keep_dims=True) / MAIN + eps)
            c = weighted(own, rms, weight[None, :], offset, WEIGHT, FIRST, DTYPE).to(DTYPE)
        k = _turned(
            rest_ptr + (row * rest_token)[:, None], cos_ptr + (row * cos_token)[:, None],
            sin_ptr + (row * sin_token)[:, None], n[:, None], r, REST, HALF, INTERLEAVED, DTYPE,
            TABLE,
        )  # fmt: skip
        mine = (first + n == token)[:, None] & (part == 0)
        to = cache_ptr + (slot // PAGE) * c_page + slot % PAGE * c_slot + n[:, None] * 0
        tl.store(to + d[None, :], c, mask=mine & (d < MAIN)[None, :])
        tl.store(to + MAIN + r, k, mask=mine & (r < REST))
        s = tl.dot(q, tl.trans(c), input_precision=PRECISION)
        s = tl.dot(q_rest, tl.trans(k), s, input_precision=PRECISION)
        key = known - end + first + n
        s = shape_scores(s, key, query, query, slope, scale, softcap, True, False, SOFTCAP, ALIBI)
        new_top = tl.maximum(top, tl.max(s, 1) * unit)
        p = tl.exp2(s * unit - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(c.dtype), c, acc, input_precision=PRECISION)
        top = new_top

    kept = (m < GROUP)[:, None] & (d < MAIN)[None, :]
    if SPLIT:
        # Also of a range that is the only one: another way to store would cost registers.
        if split == 0:
            tl.store(used_ptr + token * PARTS + part, used)
        left = ((token * PARTS + part) * splits + split) * GROUP + m
        tl.store(partial_ptr + left[:, None] * MAIN + d[None, :], acc, mask=kept)
        tl.store(stats_ptr + left * 2, top, mask=m < GROUP)
        tl.store(stats_ptr + left * 2 + 1, total, mask=m < GROUP)
    else:
        if SINKS:
            sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
            acc, total = add_sink(acc, top, total, sink)
        out_at = out_ptr + ((place * PARTS + part) * GROUP + m)[:, None] * MAIN + d[None, :]
        tl.store(out_at, (acc / total[:, None]).to(DTYPE), mask=kept)


@triton.jit
def _turned(
    row_ptr, cos_ptr, sin_ptr, rows, r, REST: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, DTYPE: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """The rows at row_ptr [M, 1], turned by the tables at cos_ptr and sin_ptr: [M, BLOCK_REST]."""
    own, other = _load_heads(row_ptr, r, REST, HALF, INTERLEAVED)
    cos, sin = _load_turn(cos_ptr, sin_ptr, rows, r, HALF, INTERLEAVED)
    return _turn(
        own, other, own, own, cos, sin, r, 0.0, 0.0, REST, HALF, False, False, False, DTYPE, TABLE
    )


@triton.jit(do_not_specialize=["splits", "out_token"])
def latent_values_kernel(
    out_ptr, weight_ptr, sinks_ptr, partial_ptr, stats_ptr, used_ptr, splits, w_head, w_row,
    w_column, out_token, out_head,
    PARTS: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, MAIN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_MAIN: tl.constexpr, BLOCK_S: tl.constexpr, SINKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(N / BLOCK_N), PARTS * GROUP, T): adds up one head's ranges, and expands the sum.

    weight [H, N, MAIN], out [T, H, N]. Every program of a head adds all of it up: at few tokens
    that is less than a launch.
    """
    head = tl.program_id(1)
    token = tl.program_id(2)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_MAIN)
    weight = tl.load(
        weight_ptr + tl.cast(head, tl.int64) * w_head + n[:, None] * w_row + d[None, :] * w_column,
        mask=(n < N)[:, None] & (d < MAIN)[None, :], other=0.0,
    )  # fmt: skip
    sink = tl.zeros([1], tl.float32)
    if SINKS:
        sink += tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = token * PARTS + head // GROUP
    used = tl.load(used_ptr + place)
    acc = tl.zeros([BLOCK_MAIN], tl.float32)
    top = tl.full([1], LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    for first in range(0, used, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        left = (place * splits + s) * GROUP + head % GROUP
        tops = tl.load(stats_ptr + left * 2, mask=s < used, other=LOWEST)
        totals = tl.load(stats_ptr + left * 2 + 1, mask=s < used, other=0.0)
        parts = tl.load(
            partial_ptr + left[:, None] * MAIN + d[None, :],
            mask=(s < used)[:, None] & (d < MAIN)[None, :], other=0.0,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(tops, 0))
        shrink = tl.exp2(top - new_top)
        share = tl.exp2(tops - new_top)
        total = total * shrink + tl.sum(totals * share, 0)
        acc = acc * shrink + tl.sum(parts * share[:, None], 0)
        top = new_top
    if SINKS:
        new_top = tl.maximum(top, sink)
        acc = acc * tl.exp2(top - new_top)
        total = total * tl.exp2(top - new_top) + tl.exp2(sink - new_top)
    mean = (acc / total).to(out_ptr.dtype.element_ty).to(tl.float32)
    value = tl.sum(weight.to(tl.float32) * mean[None, :], 1)
    out_at = out_ptr + tl.cast(token, tl.int64) * out_token + head * out_head + n
    tl.store(out_at, value.to(out_ptr.dtype.element_ty), mask=n < N)
