"""Triton kernels of attention over pages: one new token a sequence (split-KV), and any number.

A program holds rows of queries against blocks of keys. The query heads of one kv head are rows of
the same program, so each key is read once for all of them. Positions become addresses through the
block table key by key, so any page size and any start of a window will do.

Scores are in units of log2: exp2 is what the hardware has.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Finite, so that a row that has seen no key yet has differences with it.
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def _attend_keys(
    acc, top, total, q, query, lowest, slope, start, stop, last,
    k_ptr, v_ptr, table_ptr, k_page, k_slot, v_page, v_slot, scale, unit, softcap,
    D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, MASKED: tl.constexpr, FLOOR: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, PRECISION: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """Online softmax of rows q [M, D] over the keys start..stop, in blocks of BLOCK_N.

    Row m is at position query[m] and sees keys lowest[m]..query[m]. MASKED: some key of the range
    is not seen by some row, or the range ends within a block; positions after `last` are then
    read as `last`, whose page is known. KNOWN: pages are read a block ahead, so that all stages
    but one hold keys; else addresses wait for pages within a block, and every other stage is
    theirs. Returns acc [M, DV], top and total [M].
    """
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    n = tl.arange(0, BLOCK_N)
    following = n
    if KNOWN:
        following = tl.load(table_ptr + tl.minimum(start + n, last) // PAGE)
    for first in range(start, stop, BLOCK_N):
        key = first + n
        at = key
        if MASKED:
            at = tl.minimum(key, last)
        if KNOWN:
            page = following.to(tl.int64)
            following = tl.load(table_ptr + tl.minimum(key + BLOCK_N, last) // PAGE)
        else:
            page = tl.load(table_ptr + at // PAGE).to(tl.int64)
        inside = at % PAGE
        k_at = k_ptr + (page * k_page + inside * k_slot)[:, None] + d[None, :]
        if BLOCK_D == D:
            k = tl.load(k_at)
        else:
            k = tl.load(k_at, mask=(d < D)[None, :], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s = shape_scores(
            s, key, query, lowest, slope, scale, softcap, MASKED, FLOOR, SOFTCAP, ALIBI
        )
        new_top = tl.maximum(top, tl.max(s, 1) * unit)
        p = tl.exp2(s * unit - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v_at = v_ptr + (page * v_page + inside * v_slot)[:, None] + dv[None, :]
        if BLOCK_DV == DV:
            v = tl.load(v_at)
        else:
            v = tl.load(v_at, mask=(dv < DV)[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit
def shape_scores(
    s, key, query, lowest, slope, scale, softcap,
    MASKED: tl.constexpr, FLOOR: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """What is done to products s [M, N] of queries and keys before their softmax.

    Row m is at position query[m] and sees keys lowest[m]..query[m].
    """
    if SOFTCAP:
        # tanh x = 1 - 2 / (e^2x + 1): right at both ends, where e^2x is 0 or infinite.
        s = 1.0 - 2.0 / (tl.exp2(s * (scale * 2.0 * LOG2E / softcap)) + 1.0)
        s = s * (softcap * LOG2E)
    if ALIBI:
        if not SOFTCAP:
            s = s * (scale * LOG2E)
        distance = key[None, :] - query[:, None]
        s = s + slope[:, None] * distance.to(tl.float32)
    if MASKED:
        seen = key[None, :] <= query[:, None]
        if FLOOR:
            seen = seen & (key[None, :] >= lowest[:, None])
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def lowest_seen(query, window, chunk, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """Lowest position that a query at position `query` sees; elementwise."""
    lowest = query * 0
    if WINDOW:
        lowest = tl.maximum(query - window + 1, 0)
    if CHUNK:
        lowest = tl.maximum(lowest, query // chunk * chunk)
    return lowest


@triton.jit
def add_sink(acc, top, total, sink):
    """One more key for each row, of score `sink` [M] and a value of zeros."""
    new_top = tl.maximum(top, sink)
    shrink = tl.exp2(top - new_top)
    return acc * shrink[:, None], total * shrink + tl.exp2(sink - new_top)


@triton.jit(
    do_not_specialize=["table_stride", "splits", "least", "window", "chunk"],
    do_not_specialize_on_alignment=["cu_q_ptr", "kv_len_ptr", "table_ptr"],
)
def decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, cu_q_ptr, kv_len_ptr, table_ptr, sinks_ptr, slopes_ptr,
    partial_ptr, stats_ptr, arrived_ptr,
    q_token, q_head, k_page, k_slot, k_head, v_page, v_slot, v_head, table_stride, splits, least,
    scale, unit, softcap, window, chunk,
    HKV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    SINKS: tl.constexpr, SPLIT: tl.constexpr, MERGE_G: tl.constexpr, MERGE_S: tl.constexpr,
    MIXED: tl.constexpr, PRECISION: tl.constexpr, KNOWN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (B * HKV * splits): one range of the keys of one sequence, for one kv head.

    A sequence's keys are cut into at most `splits` ranges of at least `least` blocks, as many as
    its own length asks for. SPLIT: there can be more than one; the program that arrives last at
    `arrived` [B, HKV] merges them and sets it back to 0 for the next launch. MIXED: sequences that
    bring another number of tokens are left to `prefill_kernel`. Else T is B and all are attended
    to: a sequence's tokens one after the other, in the place of one that has none.
    """
    program = tl.program_id(0)
    split = program % splits
    kv_head = (program // splits) % HKV
    sequence = program // (splits * HKV)
    begin = tl.load(cu_q_ptr + sequence)
    end = tl.load(cu_q_ptr + sequence + 1)
    length = tl.load(kv_len_ptr + sequence)
    table_ptr += tl.cast(sequence, tl.int64) * table_stride
    k_ptr += kv_head * k_head
    v_ptr += kv_head * v_head
    g = tl.arange(0, BLOCK_G)
    # Rows past the group repeat its last head and are not stored.
    head = kv_head * GROUP + tl.minimum(g, GROUP - 1)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    slope = tl.zeros([BLOCK_G], tl.float32)
    if ALIBI:
        slope = tl.load(slopes_ptr + head).to(tl.float32) * LOG2E
    if PDL:
        tl.extra.cuda.gdc_wait()
        # At the end, or never before it: as fast, or slower.
        tl.extra.cuda.gdc_launch_dependents()
    count = end - begin
    if MIXED:
        count = tl.where(count == 1, 1, 0)
    for new in range(count):
        token = begin + new
        position = length - end + token
        low = lowest_seen(position, window, chunk, WINDOW, CHUNK)
        blocks = tl.cdiv(position + 1 - low, BLOCK_N)
        each = tl.maximum(tl.cdiv(blocks, splits), least)
        used = tl.cdiv(blocks, each)
        if split < used:
            q_row = tl.cast(token, tl.int64) * q_token + head * q_head
            q_at = q_ptr + q_row[:, None] + d[None, :]
            q = tl.load(q_at, mask=(d < D)[None, :], other=0.0)
            query = tl.zeros([BLOCK_G], tl.int32) + position
            start = low + split * each * BLOCK_N
            stop = tl.minimum(start + each * BLOCK_N, position + 1)
            acc, top, total = _attend_keys(
                tl.zeros([BLOCK_G, BLOCK_DV], tl.float32),
                tl.full([BLOCK_G], LOWEST, tl.float32), tl.zeros([BLOCK_G], tl.float32),
                q, query, query, slope, start, stop, position,
                k_ptr, v_ptr, table_ptr, k_page, k_slot, v_page, v_slot, scale, unit, softcap,
                D, DV, PAGE, BLOCK_N, BLOCK_D, BLOCK_DV, True, False, SOFTCAP, ALIBI, PRECISION,
                KNOWN,
            )  # fmt: skip
            row = tl.cast(token, tl.int64) * HKV + kv_head
            kept = (g < GROUP)[:, None] & (dv < DV)[None, :]
            if used == 1:
                if SINKS:
                    sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
                    acc, total = add_sink(acc, top, total, sink)
                out_at = out_ptr + (row * GROUP + g)[:, None] * DV + dv[None, :]
                tl.store(out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=kept)
            if SPLIT and used > 1:
                place = token
                if MIXED:
                    place = sequence
                place = place * HKV + kv_head
                part = (place * splits + split) * GROUP + g
                tl.store(partial_ptr + part[:, None] * DV + dv[None, :], acc, mask=kept)
                tl.store(stats_ptr + part * 2, top, mask=g < GROUP)
                tl.store(stats_ptr + part * 2 + 1, total, mask=g < GROUP)
                # All threads have stored before one of them says so.
                tl.debug_barrier()
                before = tl.atomic_add(arrived_ptr + place, 1, sem="acq_rel", scope="gpu")
                if before == used - 1:
                    merge_splits(
                        out_ptr, partial_ptr, stats_ptr, sinks_ptr, row, place, kv_head, splits,
                        used, GROUP, DV, BLOCK_DV, MERGE_G, MERGE_S, SINKS,
                    )  # fmt: skip
                    tl.store(arrived_ptr + place, 0)


@triton.jit
def merge_splits(
    out_ptr, partial_ptr, stats_ptr, sinks_ptr, row, place, kv_head, splits, used,
    GROUP: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, MERGE_G: tl.constexpr,
    MERGE_S: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Adds up the first `used` ranges left at a place, MERGE_S of MERGE_G heads at a time.

    Other programs wrote them, so they are read past the first-level cache.
    """
    dv = tl.arange(0, BLOCK_DV)[None, None, :]
    for first_head in range(0, GROUP, MERGE_G):
        g = first_head + tl.arange(0, MERGE_G)
        acc = tl.zeros([MERGE_G, BLOCK_DV], tl.float32)
        top = tl.full([MERGE_G], LOWEST, tl.float32)
        total = tl.zeros([MERGE_G], tl.float32)
        for first in range(0, used, MERGE_S):
            # Ranges in the middle: a warp has a head, and a thread the same numbers of all ranges.
            s = first + tl.arange(0, MERGE_S)
            part = (place * splits + s)[None, :] * GROUP + g[:, None]
            there = (s < used)[None, :] & (g < GROUP)[:, None]
            parts = tl.load(
                partial_ptr + part[:, :, None] * DV + dv, mask=there[:, :, None] & (dv < DV),
                other=0.0, cache_modifier=".cg",
            )  # fmt: skip
            tops = tl.load(stats_ptr + part * 2, mask=there, other=LOWEST, cache_modifier=".cg")
            totals = tl.load(stats_ptr + part * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
            new_top = tl.maximum(top, tl.max(tops, 1))
            shrink = tl.exp2(top - new_top)
            share = tl.exp2(tops - new_top[:, None])
            total = total * shrink + tl.sum(totals * share, 1)
            acc = acc * shrink[:, None] + tl.sum(parts * share[:, :, None], 1)
            top = new_top
        if SINKS:
            head = kv_head * GROUP + tl.minimum(g, GROUP - 1)
            sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
            acc, total = add_sink(acc, top, total, sink)
        # Heads past the group have no keys.
        total = tl.where(g < GROUP, total, 1.0)
        column = tl.arange(0, BLOCK_DV)[None, :]
        out_at = out_ptr + (row * GROUP + g)[:, None] * DV + column
        kept = (g < GROUP)[:, None] & (column < DV)
        tl.store(out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=kept)


@triton.jit
def find_block(cu_q_ptr, sequences, block, TOKENS: tl.constexpr):
    """Whose tokens a block of TOKENS has: the sequence, its first and past its last, the block's.

    Sequence i's blocks are numbered from cu_q[i] // TOKENS + i on: there is room for all of them
    before those of i + 1, and no sum over sequences. Numbers left over have no tokens.
    """
    low = 0
    high = sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(cu_q_ptr + middle) // TOKENS + middle <= block:
            low = middle
        else:
            high = middle - 1
    begin = tl.load(cu_q_ptr + low)
    end = tl.load(cu_q_ptr + low + 1)
    return low, begin, end, begin + (block - (begin // TOKENS + low)) * TOKENS


@triton.jit
def clear_unowned(
    out_ptr, low, end, first, sequences, tokens, kv_head, HKV: tl.constexpr, GROUP: tl.constexpr,
    TOKENS: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Zeros for what a block has of the rows after the last sequence, up to `tokens`.

    The last sequence's blocks, used and left over, reach to the end of them (see `find_block`).
    What was there before could be no numbers, and later layers would write that into pages.
    """
    if (low == sequences - 1) & (first + TOKENS > end):
        m = tl.arange(0, BLOCK_M)
        dv = tl.arange(0, BLOCK_DV)
        token = first + m // GROUP
        unowned = (m < TOKENS * GROUP) & (token >= end) & (token < tokens)
        row = tl.cast(token, tl.int64) * (HKV * GROUP) + kv_head * GROUP + m % GROUP
        nothing = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32).to(out_ptr.dtype.element_ty)
        at = out_ptr + row[:, None] * DV + dv[None, :]
        tl.store(at, nothing, mask=unowned[:, None] & (dv < DV)[None, :])


@triton.jit(
    do_not_specialize=["table_stride", "sequences", "blocks", "tokens", "window", "chunk"],
    do_not_specialize_on_alignment=["cu_q_ptr", "kv_len_ptr", "table_ptr"],
)
def prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, cu_q_ptr, kv_len_ptr, table_ptr, sinks_ptr, slopes_ptr,
    q_token, q_head, k_page, k_slot, k_head, v_page, v_slot, v_head, table_stride, sequences,
    blocks, tokens, scale, unit, softcap, window, chunk,
    HKV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    SINKS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks * HKV): BLOCK_M // GROUP tokens of one sequence, all heads of one kv head.

    See `find_block`. A sequence that brings a single token is left to `decode_kernel`. Rows that
    no sequence owns become zeros.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(0) % HKV
    # The last tokens of a sequence see the most keys: they begin first.
    block = blocks - 1 - tl.program_id(0) // HKV
    low, begin, end, first = find_block(cu_q_ptr, sequences, block, TOKENS)
    clear_unowned(
        out_ptr, low, end, first, sequences, tokens, kv_head, HKV, GROUP, TOKENS, DV, BLOCK_M,
        BLOCK_DV,
    )  # fmt: skip
    if (first >= end) | (end - begin == 1):
        return
    m = tl.arange(0, BLOCK_M)
    # Rows past the last token repeat it and are not stored.
    token = tl.minimum(first + m // GROUP, end - 1)
    head = kv_head * GROUP + m % GROUP
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    q_at = q_ptr + (tl.cast(token, tl.int64) * q_token + head * q_head)[:, None] + d[None, :]
    q = tl.load(q_at, mask=(d < D)[None, :], other=0.0)
    seen_before = tl.load(kv_len_ptr + low) - end
    query = seen_before + token
    first_query = seen_before + first
    last_query = seen_before + tl.minimum(first + TOKENS, end) - 1
    lowest = lowest_seen(query, window, chunk, WINDOW, CHUNK)
    slope = tl.zeros([BLOCK_M], tl.float32)
    if ALIBI:
        slope = tl.load(slopes_ptr + head).to(tl.float32) * LOG2E
    table_ptr += tl.cast(low, tl.int64) * table_stride
    k_ptr += kv_head * k_head
    v_ptr += kv_head * v_head
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    FLOOR: tl.constexpr = WINDOW or CHUNK
    # From `start` on lie keys that some row does not see any more, from `inner` on those that all
    # rows see, from `outer` on those that some row does not see yet.
    start = lowest_seen(first_query, window, chunk, WINDOW, CHUNK)
    inner = start
    if FLOOR:
        ahead = lowest_seen(last_query, window, chunk, WINDOW, CHUNK) - start
        inner = start + tl.cdiv(ahead, BLOCK_N) * BLOCK_N
        acc, top, total = _attend_keys(
            acc, top, total, q, query, lowest, slope, start, tl.minimum(inner, last_query + 1),
            last_query,
            k_ptr, v_ptr, table_ptr, k_page, k_slot, v_page, v_slot, scale, unit, softcap,
            D, DV, PAGE, BLOCK_N, BLOCK_D, BLOCK_DV, True, FLOOR, SOFTCAP, ALIBI, PRECISION,
            False,
        )  # fmt: skip
    outer = inner + tl.maximum(first_query + 1 - inner, 0) // BLOCK_N * BLOCK_N
    acc, top, total = _attend_keys(
        acc, top, total, q, query, lowest, slope, inner, outer, last_query,
        k_ptr, v_ptr, table_ptr, k_page, k_slot, v_page, v_slot, scale, unit, softcap,
        D, DV, PAGE, BLOCK_N, BLOCK_D, BLOCK_DV, False, False, SOFTCAP, ALIBI, PRECISION,
        False,
    )  # fmt: skip
    acc, top, total = _attend_keys(
        acc, top, total, q, query, lowest, slope, outer, last_query + 1, last_query,
        k_ptr, v_ptr, table_ptr, k_page, k_slot, v_page, v_slot, scale, unit, softcap,
        D, DV, PAGE, BLOCK_N, BLOCK_D, BLOCK_DV, True, False, SOFTCAP, ALIBI, PRECISION,
        False,
    )  # fmt: skip
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        acc, total = add_sink(acc, top, total, sink)
    kept = (m < TOKENS * GROUP) & (first + m // GROUP < end)
    out_at = out_ptr + (tl.cast(token, tl.int64) * (HKV * GROUP) + head)[:, None] * DV + dv[None, :]
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_at, out, mask=kept[:, None] & (dv < DV)[None, :])
