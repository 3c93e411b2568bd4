"""Triton kernels of attention to latent rows in pages: a row is a key and, in part, its value.

A row is read in two parts, each as wide as a power of 2 or padded to one: 576 numbers are 512 and
64, not 1024. The first part stays where it is between the two products, as keys and as values.
Rows are wide, so a program has few heads: the heads that share a latent are dealt out as `PARTS`
groups, and a "kv head" below is one group.
"""

import triton
import triton.language as tl

from .paged_attention_kernel import (
    LOG2E,
    LOWEST,
    add_sink,
    clear_unowned,
    find_block,
    lowest_seen,
    shape_scores,
)


@triton.jit
def _attend_rows(
    acc, top, total, q, q_rest, query, lowest, slope, start, stop, last,
    cache_ptr, table_ptr, c_page, c_slot, scale, unit, softcap,
    MAIN: tl.constexpr, REST: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_MAIN: tl.constexpr, BLOCK_REST: tl.constexpr, FLOOR: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, PRECISION: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """As `_attend_keys` of paged attention, for q [M, MAIN] and q_rest [M, REST].

    Every block is masked: beside rows this wide it costs little. ALL: every query sees every key
    up to `last`, and none after it. Returns acc [M, MAIN], top and
    total [M].
    """
    d = tl.arange(0, BLOCK_MAIN)
    r = tl.arange(0, BLOCK_REST)
    n = tl.arange(0, BLOCK_N)
    page = tl.load(table_ptr + tl.minimum(start + n, last) // PAGE)
    for first in range(start, stop, BLOCK_N):
        key = first + n
        inside = tl.minimum(key, last) % PAGE
        row = cache_ptr + (page.to(tl.int64) * c_page + inside * c_slot)
        # Known a block ahead, so that rows are fetched `num_stages` ahead and not half of them.
        page = tl.load(table_ptr + tl.minimum(key + BLOCK_N, last) // PAGE)
        if BLOCK_MAIN == MAIN:
            k = tl.load(row[:, None] + d[None, :])
        else:
            k = tl.load(row[:, None] + d[None, :], mask=(d < MAIN)[None, :], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if REST:
            rest_at = row[:, None] + (MAIN + r)[None, :]
            if BLOCK_REST == REST:
                k_rest = tl.load(rest_at)
            else:
                k_rest = tl.load(rest_at, mask=(r < REST)[None, :], other=0.0)
            s = tl.dot(q_rest, tl.trans(k_rest), s, input_precision=PRECISION)
        s = shape_scores(
            s, key, query, lowest, slope, scale, softcap, not ALL, FLOOR, SOFTCAP, ALIBI
        )
        if ALL:
            s = tl.where((key <= last)[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * unit)
        p = tl.exp2(s * unit - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(k.dtype), k, acc, input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit
def _load_queries(
    at, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_MAIN: tl.constexpr, BLOCK_REST: tl.constexpr
):
    """Both parts of the rows at addresses `at` [M]; where there is no rest, anything."""
    d = tl.arange(0, BLOCK_MAIN)
    q = tl.load(at[:, None] + d[None, :], mask=(d < MAIN)[None, :], other=0.0)
    q_rest = q
    if REST:
        r = tl.arange(0, BLOCK_REST)
        q_rest = tl.load(at[:, None] + (MAIN + r)[None, :], mask=(r < REST)[None, :], other=0.0)
    return q, q_rest


@triton.jit(
    do_not_specialize=["table_stride", "sequences", "splits", "least", "window", "chunk"],
    do_not_specialize_on_alignment=["cu_q_ptr", "kv_len_ptr", "table_ptr"],
)
def latent_decode_kernel(
    q_ptr, cache_ptr, out_ptr, cu_q_ptr, kv_len_ptr, table_ptr, sinks_ptr, slopes_ptr,
    partial_ptr, stats_ptr, used_ptr,
    q_token, q_head, c_page, c_slot, c_head, table_stride, sequences, splits, least,
    scale, unit, softcap, window, chunk,
    HKV: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, MAIN: tl.constexpr,
    REST: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, BLOCK_MAIN: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr,
    SPLIT: tl.constexpr, MIXED: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (B * HKV * splits): one range of the keys of one sequence, for one group of heads.

    Cut as by `decode_kernel` of paged attention; see `_single_token` for MIXED. SPLIT: there can
    be more than one range, and `latent_merge_kernel` makes the result of what each leaves; `used`
    [B, HKV] says how many there are. A range that is the only one goes that way too: a second way
    to store costs registers that 64 rows do not have.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    split = program % splits
    kv_head = (program // splits) % HKV
    place = program // (splits * HKV)
    token, sequence, left = _single_token(cu_q_ptr, place, sequences, MIXED)
    if left:
        return
    position = tl.load(kv_len_ptr + sequence) - tl.load(cu_q_ptr + sequence + 1) + token
    low = lowest_seen(position, window, chunk, WINDOW, CHUNK)
    blocks = tl.cdiv(position + 1 - low, BLOCK_N)
    each = tl.maximum(tl.cdiv(blocks, splits), least)
    used = tl.cdiv(blocks, each)
    if split >= used:
        return
    m = tl.arange(0, BLOCK_M)
    # Rows past the group repeat its last head and are not stored.
    head = kv_head * GROUP + tl.minimum(m, GROUP - 1)
    slope = tl.zeros([BLOCK_M], tl.float32)
    if ALIBI:
        slope = tl.load(slopes_ptr + head).to(tl.float32) * LOG2E
    q_at = q_ptr + tl.cast(token, tl.int64) * q_token + head * q_head
    q, q_rest = _load_queries(q_at, MAIN, REST, BLOCK_MAIN, BLOCK_REST)
    query = tl.zeros([BLOCK_M], tl.int32) + position
    start = low + split * each * BLOCK_N
    stop = tl.minimum(start + each * BLOCK_N, position + 1)
    acc, top, total = _attend_rows(
        tl.zeros([BLOCK_M, BLOCK_MAIN], tl.float32),
        tl.full([BLOCK_M], LOWEST, tl.float32), tl.zeros([BLOCK_M], tl.float32),
        q, q_rest, query, query, slope, start, stop, position,
        cache_ptr + kv_head // PARTS * c_head,
        table_ptr + tl.cast(sequence, tl.int64) * table_stride, c_page, c_slot, scale, unit,
        softcap, MAIN, REST, PAGE, BLOCK_N, BLOCK_MAIN, BLOCK_REST, False, SOFTCAP, ALIBI,
        PRECISION, False,
    )  # fmt: skip
    dv = tl.arange(0, BLOCK_MAIN)
    kept = (m < GROUP)[:, None] & (dv < DV)[None, :]
    if SPLIT:
        place = place * HKV + kv_head
        if split == 0:
            tl.store(used_ptr + place, used)
        part = (place * splits + split) * GROUP + m
        tl.store(partial_ptr + part[:, None] * DV + dv[None, :], acc, mask=kept)
        tl.store(stats_ptr + part * 2, top, mask=m < GROUP)
        tl.store(stats_ptr + part * 2 + 1, total, mask=m < GROUP)
    else:
        if SINKS:
            sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
            acc, total = add_sink(acc, top, total, sink)
        row = (tl.cast(token, tl.int64) * HKV + kv_head) * GROUP + m
        out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row[:, None] * DV + dv[None, :], out, mask=kept)


@triton.jit
def _single_token(cu_q_ptr, place, sequences, MIXED: tl.constexpr):
    """The token decoded at a place, its sequence, and whether there is none.

    MIXED: a place is a sequence, and has none unless it brings exactly one. Else T is B and a
    place is a token, often but not always the only one of the sequence of that number.
    """
    begin = tl.load(cu_q_ptr + place)
    end = tl.load(cu_q_ptr + place + 1)
    token = begin
    sequence = place
    left = end - begin != 1
    if not MIXED:
        own = (begin <= place) & (place < end)
        token = place
        sequence = tl.where(own, place, 0)
        high = tl.where(own, place, sequences - 1)
        while sequence < high:
            middle = (sequence + high + 1) // 2
            if tl.load(cu_q_ptr + middle) <= place:
                sequence = middle
            else:
                high = middle - 1
        left = place >= tl.load(cu_q_ptr + sequences)
    return token, sequence, left


@triton.jit(do_not_specialize=["sequences", "splits"], do_not_specialize_on_alignment=["cu_q_ptr"])
def latent_merge_kernel(
    out_ptr, cu_q_ptr, sinks_ptr, partial_ptr, stats_ptr, used_ptr, sequences, splits,
    HKV: tl.constexpr, GROUP: tl.constexpr, DV: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr, SINKS: tl.constexpr, MIXED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (B * HKV * GROUP, ceil(DV / BLOCK_C)): adds up the ranges of one head of one token.

    Apart from the ranges, so that as many programs as there are heads read what they left: 16
    heads in 50 ranges leave 1.6 MB.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    place = tl.program_id(0) // GROUP
    head = tl.program_id(0) % GROUP
    token, _, left = _single_token(cu_q_ptr, place // HKV, sequences, MIXED)
    if left:
        return
    used = tl.load(used_ptr + place)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_C], tl.float32)
    top = tl.full([1], LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    for first in range(0, used, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        part = (place * splits + s) * GROUP + head
        tops = tl.load(stats_ptr + part * 2, mask=s < used, other=LOWEST)
        totals = tl.load(stats_ptr + part * 2 + 1, mask=s < used, other=0.0)
        parts = tl.load(
            partial_ptr + part[:, None] * DV + c[None, :],
            mask=(s < used)[:, None] & (c < DV)[None, :], other=0.0,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(tops, 0))
        shrink = tl.exp2(top - new_top)
        share = tl.exp2(tops - new_top)
        total = total * shrink + tl.sum(totals * share, 0)
        acc = acc * shrink + tl.sum(parts * share[:, None], 0)
        top = new_top
    if SINKS:
        sink = tl.load(sinks_ptr + place % HKV * GROUP + head).to(tl.float32) * LOG2E
        new_top = tl.maximum(top, sink)
        acc = acc * tl.exp2(top - new_top)
        total = total * tl.exp2(top - new_top) + tl.exp2(sink - new_top)
    row = (tl.cast(token, tl.int64) * HKV + place % HKV) * GROUP + head
    tl.store(out_ptr + row * DV + c, (acc / total).to(out_ptr.dtype.element_ty), mask=c < DV)


@triton.jit(
    do_not_specialize=["table_stride", "sequences", "blocks", "tokens", "window", "chunk"],
    do_not_specialize_on_alignment=["cu_q_ptr", "kv_len_ptr", "table_ptr"],
)
def latent_prefill_kernel(
    q_ptr, cache_ptr, out_ptr, cu_q_ptr, kv_len_ptr, table_ptr, sinks_ptr, slopes_ptr,
    q_token, q_head, c_page, c_slot, c_head, table_stride, sequences, blocks, tokens,
    scale, unit, softcap, window, chunk,
    HKV: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, MAIN: tl.constexpr,
    REST: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, BLOCK_MAIN: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks * HKV): BLOCK_M // GROUP tokens of one sequence, one group of heads.

    See `find_block`. A sequence that brings a single token is left to `latent_decode_kernel`.
    Rows that no sequence owns become zeros.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(0) % HKV
    # The last tokens of a sequence see the most keys: they begin first.
    block = blocks - 1 - tl.program_id(0) // HKV
    sequence, begin, end, first = find_block(cu_q_ptr, sequences, block, TOKENS)
    clear_unowned(
        out_ptr, sequence, end, first, sequences, tokens, kv_head, HKV, GROUP, TOKENS, DV, BLOCK_M,
        BLOCK_MAIN,
    )  # fmt: skip
    if (first >= end) | (end - begin == 1):
        return
    m = tl.arange(0, BLOCK_M)
    # Rows past the last token repeat it and are not stored.
    token = tl.minimum(first + m // GROUP, end - 1)
    head = kv_head * GROUP + m % GROUP
    q_at = q_ptr + tl.cast(token, tl.int64) * q_token + head * q_head
    q, q_rest = _load_queries(q_at, MAIN, REST, BLOCK_MAIN, BLOCK_REST)
    seen_before = tl.load(kv_len_ptr + sequence) - end
    query = seen_before + token
    first_query = seen_before + first
    last_query = seen_before + tl.minimum(first + TOKENS, end) - 1
    lowest = lowest_seen(query, window, chunk, WINDOW, CHUNK)
    slope = tl.zeros([BLOCK_M], tl.float32)
    if ALIBI:
        slope = tl.load(slopes_ptr + head).to(tl.float32) * LOG2E
    table_ptr += tl.cast(sequence, tl.int64) * table_stride
    cache_ptr += kv_head // PARTS * c_head
    FLOOR: tl.constexpr = WINDOW or CHUNK
    start = lowest_seen(first_query, window, chunk, WINDOW, CHUNK)
    acc, top, total = _attend_rows(
        tl.zeros([BLOCK_M, BLOCK_MAIN], tl.float32),
        tl.full([BLOCK_M], LOWEST, tl.float32), tl.zeros([BLOCK_M], tl.float32),
        q, q_rest, query, lowest, slope, start, last_query + 1, last_query,
        cache_ptr, table_ptr, c_page, c_slot, scale, unit, softcap, MAIN, REST, PAGE,
        BLOCK_N, BLOCK_MAIN, BLOCK_REST, FLOOR, SOFTCAP, ALIBI, PRECISION, False,
    )  # fmt: skip
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        acc, total = add_sink(acc, top, total, sink)
    dv = tl.arange(0, BLOCK_MAIN)
    kept = (m < TOKENS * GROUP) & (first + m // GROUP < end)
    row = tl.cast(token, tl.int64) * (HKV * GROUP) + head
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(
        out_ptr + row[:, None] * DV + dv[None, :], out, mask=kept[:, None] & (dv < DV)[None, :]
    )
