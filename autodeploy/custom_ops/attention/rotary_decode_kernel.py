"""Triton kernel of a decoding step's attention in one launch: heads are turned where they are read.

With few sequences such a step is latency: loads that wait for each other. What no kernel of this
step writes, lengths, tables and the keys and values of earlier steps, is fetched before the wait
for the kernel in front. Then remain: heads, a softmax over a block that lies in registers, and,
where a sequence is cut into ranges, their meeting. With many sequences the next block is on its
way, in registers, while one is attended to, and programs share a multiprocessor.

A token's own key goes from registers into its score; no program reads what another one writes, but
for the sums of ranges.
"""

import triton
import triton.language as tl

from ..rope.rotary_kernel import weighted
from .paged_attention_kernel import (
    LOG2E,
    LOWEST,
    lowest_seen,
    merge_splits,
)


@triton.jit
def _find_token(cu_q_ptr, kv_len_ptr, token, sequences):
    """Whose a token is: its sequence, the sequence's first token, past its last, its known tokens.

    Nearly always that of its own number. A token that no sequence owns is one of its own, all
    alone: its row is to be anything.
    """
    sequence = token
    begin = tl.load(cu_q_ptr + token)
    end = tl.load(cu_q_ptr + token + 1)
    known = tl.load(kv_len_ptr + token)
    if (begin != token) | (end != token + 1):
        low = token * 0
        high = token * 0 + sequences - 1
        while low < high:
            middle = (low + high + 1) // 2
            if tl.load(cu_q_ptr + middle) <= token:
                low = middle
            else:
                high = middle - 1
        sequence = low
        begin = tl.load(cu_q_ptr + low)
        end = tl.load(cu_q_ptr + low + 1)
        known = tl.load(kv_len_ptr + low)
        if token >= end:
            begin = token
            end = token + 1
            known = token * 0 + 1
    return sequence, begin, end, known


@triton.jit
def _partner(d, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The number that number d of a head is turned with; any for those that stay."""
    if INTERLEAVED:
        return d ^ 1
    return (d + HALF) % (2 * HALF)


@triton.jit
def _load_weight(
    weight_ptr, g, d, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    WEIGHT: tl.constexpr,
):  # fmt: skip
    """A norm's weight for each number and for its partner, float32; where there is none anything.

    As everything that meets heads [M, BLOCK_D] it is loaded for each row of them, g is [M, 1]: a
    thread then has what it needs, and nothing passes through shared memory.
    """
    own = (g + d).to(tl.float32)
    other = own
    if WEIGHT:
        own = tl.load(weight_ptr + g * 0 + d, mask=d < D, other=0.0).to(tl.float32)
        if HALF > 0:
            at = _partner(d, HALF, INTERLEAVED)
            other = tl.load(weight_ptr + g * 0 + at, mask=d < 2 * HALF, other=0.0).to(tl.float32)
    return own, other


@triton.jit
def _load_heads(row_ptr, d, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Heads at row_ptr [M, 1] and, of each number, its partner: two tiles [M, BLOCK_D] float32."""
    own = tl.load(row_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    other = own
    if HALF > 0:
        at = _partner(d, HALF, INTERLEAVED)
        other = tl.load(row_ptr + at, mask=d < 2 * HALF, other=0.0).to(tl.float32)
    return own, other


@triton.jit
def _load_turn(cos_ptr, sin_ptr, g, d, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A token's cosine and sine for each number of heads, float32; the sine has its sign."""
    cos = (g + d).to(tl.float32)
    sin = cos
    if HALF > 0:
        at = d
        first = d < HALF
        if INTERLEAVED:
            at = d // 2
            first = d % 2 == 0
        cos = tl.load(cos_ptr + g * 0 + at, mask=d < 2 * HALF, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + g * 0 + at, mask=d < 2 * HALF, other=0.0).to(tl.float32)
        sin = tl.where(first, -sin, sin)
    return cos, sin


@triton.jit
def _turn(
    own, other, weight, other_weight, cos, sin, d, eps, offset,
    D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr,
    FIRST: tl.constexpr, DTYPE: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Heads [M, BLOCK_D] normalised and turned, with the rounding of the ops apart.

    To DTYPE; products with cosines and sines to theirs, TABLE, first.
    """
    y = own
    if NORM:
        scale = tl.rsqrt(tl.sum(own * own, 1, keep_dims=True) / D + eps)
        y = weighted(own, scale, weight, offset, WEIGHT, FIRST, DTYPE)
        if HALF > 0:
            other = weighted(other, scale, other_weight, offset, WEIGHT, FIRST, DTYPE)
    if HALF > 0:
        # Products are rounded before the sum, as by torch; the compiler may spare one of them.
        turned = (y * cos).to(TABLE).to(tl.float32) + (other * sin).to(TABLE).to(tl.float32)
        y = tl.where(d < 2 * HALF, turned, y)
    return y.to(DTYPE)


@triton.jit
def _shape(s, distance, slope, scale, softcap, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """What is done to products s of queries and keys `distance` away; all of them broadcast."""
    if SOFTCAP:
        # tanh x = 1 - 2 / (e^2x + 1): right at both ends, where e^2x is 0 or infinite.
        s = 1.0 - 2.0 / (tl.exp2(s * (scale * 2.0 * LOG2E / softcap)) + 1.0)
        s = s * (softcap * LOG2E)
    if ALIBI:
        if not SOFTCAP:
            s = s * (scale * LOG2E)
        s = s + slope * distance.to(tl.float32)
    return s


@triton.jit
def _weigh(
    s, key, stop, position, top, slope, scale, unit, softcap,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """Powers [BLOCK_N, BLOCK_G] of products s of keys and queries, and their new top."""
    s = _shape(s, (key - position)[:, None], slope[None, :], scale, softcap, SOFTCAP, ALIBI)
    s = tl.where((key < stop)[:, None], s * unit, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 0))
    return tl.exp2(s - new_top[None, :]), new_top


@triton.jit
def _add_key(acc, top, total, score, v):
    """One more key for each column, of score [BLOCK_G] and value v [BLOCK_DV]."""
    new_top = tl.maximum(top, score)
    shrink = tl.exp2(top - new_top)
    share = tl.exp2(score - new_top)
    acc = acc * shrink[None, :] + share[None, :] * v.to(tl.float32)[:, None]
    return acc, new_top, total * shrink + share


@triton.jit
def _leave(
    acc, top, total, out_ptr, partial_ptr, stats_ptr, sinks_ptr, place, kv_head, split, splits,
    used, GROUP: tl.constexpr, DV: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_DV: tl.constexpr,
    SINKS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Writes the result of a sequence's only range, or the sums of one of several."""
    g = tl.arange(0, BLOCK_G)
    dv = tl.arange(0, BLOCK_DV)
    kept = (dv < DV)[:, None] & (g < GROUP)[None, :]
    if used == 1:
        if SINKS:
            # One more key, of a value of zeros.
            sink = tl.load(sinks_ptr + kv_head * GROUP + tl.minimum(g, GROUP - 1)).to(tl.float32)
            nothing = tl.zeros([BLOCK_DV], tl.float32)
            acc, top, total = _add_key(acc, top, total, sink * LOG2E, nothing)
        out_at = out_ptr + (tl.cast(place, tl.int64) * GROUP + g)[None, :] * DV + dv[:, None]
        tl.store(out_at, (acc / total[None, :]).to(out_ptr.dtype.element_ty), mask=kept)
    if SPLIT and used > 1:
        part = (place * splits + split) * GROUP + g
        tl.store(partial_ptr + part[None, :] * DV + dv[:, None], acc, mask=kept)
        tl.store(stats_ptr + part * 2, top, mask=g < GROUP)
        tl.store(stats_ptr + part * 2 + 1, total, mask=g < GROUP)


@triton.jit
def _page_of(key, PAGE: tl.constexpr):
    """Which page of a sequence a key is in: a shift, where a signed quotient is several steps."""
    return (key.to(tl.uint32) // PAGE).to(tl.int32)


@triton.jit
def _load_block(
    cache_ptr, page, key, stop, page_stride, slot_stride,
    D: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys or values [BLOCK_N, BLOCK_D] before `stop`, zeros from there on."""
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (key.to(tl.uint32) % PAGE).to(tl.int32)
    at = cache_ptr + (page.to(tl.int64) * page_stride + inside * slot_stride)[:, None] + d
    there = (key < stop)[:, None]
    if BLOCK_D != D:
        there = there & (d < D)
    return tl.load(at, mask=there, other=0.0)


@triton.jit(
    do_not_specialize=[
        "table_stride", "slot_stride", "sequences", "pages", "splits", "least", "window", "chunk",
        "q_eps", "k_eps", "offset",
    ],
    do_not_specialize_on_alignment=["cu_q_ptr", "kv_len_ptr", "table_ptr", "slot_ptr"],
)  # fmt: skip
def rotary_decode_kernel(
    q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, out_ptr, cu_q_ptr, kv_len_ptr, table_ptr,
    slot_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, sinks_ptr, slopes_ptr, partial_ptr,
    stats_ptr, arrived_ptr,
    q_token, q_head, k_token, k_head, v_token, v_head, k_page, k_slot, k_cache_head, v_page,
    v_slot, v_cache_head, table_stride, slot_stride, cos_token, sin_token, sequences, pages,
    splits, least, scale, unit, softcap, window, chunk, q_eps, k_eps, offset,
    HKV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    Q_WEIGHT: tl.constexpr, K_WEIGHT: tl.constexpr, FIRST: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr,
    SPLIT: tl.constexpr, MERGE_G: tl.constexpr, MERGE_S: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (HKV, T, splits), T tokens of as many sequences: one range of a token's keys.

    q [T, HKV * GROUP, D], k [T, HKV, D], v [T, HKV, DV]; cos and sin [T, 2 * HALF]. Keys of
    earlier steps are cut into at most `splits` ranges of at least `least` blocks, as many as there
    are for; the program of the last range also takes the new key, and writes it and its value to
    their slot. SPLIT: there can be more than one range; the program that arrives last at `arrived`
    [T, HKV] merges them and sets it back to 0 for the next launch. Ranges that nobody needs are
    numbered last, so that those in use spread over the device.
    """
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    TABLE: tl.constexpr = cos_ptr.dtype.element_ty
    kv_head = tl.program_id(0)
    token = tl.program_id(1)
    split = tl.program_id(2)
    n = tl.arange(0, BLOCK_N)
    # Where the first block lies if the token is its sequence's only one and no range is longer
    # than it must: asked for beside the lengths, not after them.
    guess = split * least * BLOCK_N
    at = _page_of(guess + n, PAGE)
    guessed = tl.load(
        table_ptr + tl.cast(token, tl.int64) * table_stride + at, mask=at < pages, other=0
    )
    g = tl.arange(0, BLOCK_G)
    # Rows past the group repeat its last head and are not stored.
    head = kv_head * GROUP + tl.minimum(g, GROUP - 1)
    d = tl.arange(0, BLOCK_D)[None, :]
    dv = tl.arange(0, BLOCK_DV)
    rows = g[:, None]
    q_weight, q_other_weight = _load_weight(q_norm_ptr, rows, d, D, HALF, INTERLEAVED, Q_WEIGHT)
    k_weight, k_other_weight = _load_weight(k_norm_ptr, rows, d, D, HALF, INTERLEAVED, K_WEIGHT)
    slope = tl.zeros([BLOCK_G], tl.float32)
    if ALIBI:
        slope = tl.load(slopes_ptr + head).to(tl.float32) * LOG2E
    slot = tl.load(slot_ptr + token * slot_stride).to(tl.int64)
    sequence, begin, end, known = _find_token(cu_q_ptr, kv_len_ptr, token, sequences)
    position = known - end + token
    low = lowest_seen(position, window, chunk, WINDOW, CHUNK)
    # Earlier steps wrote keys up to here.
    old = tl.maximum(known - (end - begin), low)
    blocks = tl.cdiv(old - low, BLOCK_N)
    each = tl.maximum(tl.cdiv(blocks, splits), least)
    used = tl.maximum(tl.cdiv(blocks, each), 1)
    if split >= used:
        return
    start = low + split * each * BLOCK_N
    stop = tl.minimum(start + each * BLOCK_N, old)
    last = split == used - 1

    table_ptr += tl.cast(sequence, tl.int64) * table_stride
    k_cache_ptr += kv_head * k_cache_head
    v_cache_ptr += kv_head * v_cache_head
    key = start + n
    right = (sequence == token) & (start == guess)
    page = tl.load(table_ptr + _page_of(key, PAGE), mask=(key < stop) & (not right), other=0)
    page = tl.where(right & (key < stop), guessed, page)
    # Where a block lies is known before it is asked for.
    ahead = key + BLOCK_N
    next_page = tl.load(table_ptr + _page_of(ahead, PAGE), mask=ahead < stop, other=0)
    if PDL:
        # Here, for what follows waits until keys are there.
        tl.extra.cuda.gdc_launch_dependents()
    # The first block lies in shared memory when the wait is over, a second one in registers. The
    # compiler has a block moved as soon as it is loaded: what comes first is what is needed first.
    k = _load_block(k_cache_ptr, page, key, stop, k_page, k_slot, D, PAGE, BLOCK_D)
    v = _load_block(v_cache_ptr, page, key, stop, v_page, v_slot, DV, PAGE, BLOCK_DV)
    next_k = _load_block(k_cache_ptr, next_page, ahead, stop, k_page, k_slot, D, PAGE, BLOCK_D)
    next_v = _load_block(v_cache_ptr, next_page, ahead, stop, v_page, v_slot, DV, PAGE, BLOCK_DV)
    next_page = tl.load(
        table_ptr + _page_of(ahead + BLOCK_N, PAGE), mask=ahead + BLOCK_N < stop, other=0
    )
    if PDL:
        tl.extra.cuda.gdc_wait()

    row = tl.cast(token, tl.int64)
    q_at = q_ptr + (row * q_token + head * q_head)[:, None]
    k_at = k_ptr + row * k_token + kv_head * k_head + rows * 0
    q_own, q_other = _load_heads(q_at, d, D, HALF, INTERLEAVED)
    k_own, k_other = _load_heads(k_at, d, D, HALF, INTERLEAVED)
    cos, sin = _load_turn(
        cos_ptr + row * cos_token, sin_ptr + row * sin_token, rows, d, HALF, INTERLEAVED
    )
    v_new = tl.load(v_ptr + row * v_token + kv_head * v_head + dv, mask=dv < DV, other=0.0)
    q = _turn(
        q_own, q_other, q_weight, q_other_weight, cos, sin, d, q_eps, offset, D, HALF, Q_NORM,
        Q_WEIGHT, FIRST, DTYPE, TABLE,
    )  # fmt: skip
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    # No branch: every program loads the new key, or the load would wait for the queries.
    k_new = _turn(
        k_own, k_other, k_weight, k_other_weight, cos, sin, d, k_eps, offset, D, HALF, K_NORM,
        K_WEIGHT, FIRST, DTYPE, TABLE,
    )  # fmt: skip
    # The new key is the first of the last range.
    own_score = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1)
    own_score = unit * _shape(own_score, token * 0, slope, scale, softcap, SOFTCAP, ALIBI)
    top = tl.where(last, own_score, LOWEST)
    total = tl.zeros([BLOCK_G], tl.float32) + tl.where(last, 1.0, 0.0)
    acc = tl.zeros([BLOCK_DV, BLOCK_G], tl.float32)
    acc += tl.where(last, v_new.to(tl.float32), 0.0)[:, None]
    p, new_top = _weigh(s, key, stop, position, top, slope, scale, unit, softcap, SOFTCAP, ALIBI)
    shrink = tl.exp2(top - new_top)
    acc = tl.dot(tl.trans(v), p.to(DTYPE), acc * shrink[None, :], input_precision=PRECISION)
    total = total * shrink + tl.sum(p, 0)
    top = new_top
    k = next_k
    v = next_v
    for first in range(start + BLOCK_N, stop, BLOCK_N):
        key = first + n
        ahead = key + BLOCK_N
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        # These keys are in shared memory now: the next ones take their registers.
        page = next_page
        k = _load_block(k_cache_ptr, page, ahead, stop, k_page, k_slot, D, PAGE, BLOCK_D)
        next_page = tl.load(
            table_ptr + _page_of(ahead + BLOCK_N, PAGE), mask=ahead + BLOCK_N < stop, other=0
        )
        p, new_top = _weigh(
            s, key, stop, position, top, slope, scale, unit, softcap, SOFTCAP, ALIBI
        )
        shrink = tl.exp2(top - new_top)
        acc = tl.dot(tl.trans(v), p.to(DTYPE), acc * shrink[None, :], input_precision=PRECISION)
        v = _load_block(v_cache_ptr, page, ahead, stop, v_page, v_slot, DV, PAGE, BLOCK_DV)
        total = total * shrink + tl.sum(p, 0)
        top = new_top

    place = token * HKV + kv_head
    # The sequence's other tokens of this step, where it brings more than one. Results are left in
    # either branch: those of the usual one never change their layout for this loop.
    first_new = tl.where(last, tl.maximum(begin, low - known + end), token)
    if first_new < token:
        for earlier in range(first_new, token):
            row = tl.cast(earlier, tl.int64)
            k_at = k_ptr + row * k_token + kv_head * k_head + rows * 0
            k_own, k_other = _load_heads(k_at, d, D, HALF, INTERLEAVED)
            cos, sin = _load_turn(
                cos_ptr + row * cos_token, sin_ptr + row * sin_token, rows, d, HALF, INTERLEAVED
            )
            k_weight, k_other_weight = _load_weight(
                k_norm_ptr, rows, d, D, HALF, INTERLEAVED, K_WEIGHT
            )
            k_earlier = _turn(
                k_own, k_other, k_weight, k_other_weight, cos, sin, d, k_eps, offset, D, HALF,
                K_NORM, K_WEIGHT, FIRST, DTYPE, TABLE,
            )  # fmt: skip
            score = tl.sum(q.to(tl.float32) * k_earlier.to(tl.float32), 1)
            score = unit * _shape(score, earlier - token, slope, scale, softcap, SOFTCAP, ALIBI)
            v_at = v_ptr + row * v_token + kv_head * v_head + dv
            acc, top, total = _add_key(
                acc, top, total, score, tl.load(v_at, mask=dv < DV, other=0.0)
            )
        _leave(
            acc, top, total, out_ptr, partial_ptr, stats_ptr, sinks_ptr, place, kv_head, split,
            splits, used, GROUP, DV, BLOCK_G, BLOCK_DV, SINKS, SPLIT,
        )  # fmt: skip
    else:
        _leave(
            acc, top, total, out_ptr, partial_ptr, stats_ptr, sinks_ptr, place, kv_head, split,
            splits, used, GROUP, DV, BLOCK_G, BLOCK_DV, SINKS, SPLIT,
        )  # fmt: skip
    if SPLIT and used > 1:
        # All threads have stored before one of them says so.
        tl.debug_barrier()
        before = tl.atomic_add(arrived_ptr + place, 1, sem="acq_rel", scope="gpu")
        if before == used - 1:
            merge_splits(
                out_ptr, partial_ptr, stats_ptr, sinks_ptr, tl.cast(place, tl.int64), place,
                kv_head, splits, used, GROUP, DV, BLOCK_DV, MERGE_G, MERGE_S, SINKS,
            )  # fmt: skip
            tl.store(arrived_ptr + place, 0)
    # Last, for nobody waits for it: only later steps read these.
    inside = slot % PAGE
    k_to = k_cache_ptr + (slot // PAGE) * k_page + inside * k_slot + rows * 0 + d
    tl.store(k_to, k_new, mask=(rows == 0) & (d < D) & last)
    v_to = v_cache_ptr + (slot // PAGE) * v_page + inside * v_slot + dv
    tl.store(v_to, v_new, mask=(dv < DV) & last)
