"""Gated delta rule of long runs of tokens, in windows of the packed tokens (the WY form).

The corrections of a window's tokens depend on each other through a unit lower triangular system.
Its inverse depends on no state: a first kernel finds it for all windows side by side, a second one
runs through the windows of a sequence with matrix products alone. Windows start at multiples of
their length, whatever sequences they hold; the inverse is then block diagonal.
"""

import triton
import triton.language as tl

from .packed_kernel import sequence_of, sequence_span


@triton.jit
def _lengths(x, NORMALIZE: tl.constexpr):
    """What rows of x [L, Dk] are multiplied by: to length 1 if NORMALIZE."""
    squared = tl.sum(x * x, axis=1)
    return tl.rsqrt(squared + 1e-6) if NORMALIZE else squared * 0 + 1


@triton.jit(do_not_specialize=["sequences"])
def delta_solve_kernel(
    k, g, beta, cu_q, inverse, sequences, k_stride, g_stride, beta_stride,
    SEARCH_STEPS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """inverse [windows * L, H, L] float32; one program per window of L tokens and head."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(1)
    index = tl.arange(0, BLOCK_TOKENS)
    key = tl.arange(0, BLOCK_KEYS)
    token = tl.program_id(0) * BLOCK_TOKENS + index
    sequence = sequence_of(token, cu_q, sequences, SEARCH_STEPS)
    valid = token < tl.load(cu_q + sequences)
    row = token.to(tl.int64)
    group = head // (HEADS // GROUPS) * KEYS
    keys = tl.load(
        k + row[:, None] * k_stride + group + key[None, :],
        mask=valid[:, None] & (key < KEYS)[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    length = _lengths(keys, NORMALIZE)
    decay = tl.load(g + row * g_stride + head, mask=valid, other=0.0).to(tl.float32)
    strength = tl.load(beta + row * beta_stride + head, mask=valid, other=0.0).to(tl.float32)
    since_start = tl.cumsum(decay, axis=0)

    # Transposed: entry [j, i] is what the correction of token i takes from that of token j.
    products = tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
    products = products * length[:, None] * (length * strength)[None, :]
    linked = (index[:, None] < index[None, :]) & (sequence[:, None] == sequence[None, :])
    between = tl.where(linked, since_start[None, :] - since_start[:, None], -1e30)
    system = products * tl.exp(between)
    solved = tl.where(index[:, None] == index[None, :], 1.0, 0.0)
    for i in range(1, BLOCK_TOKENS):
        factors = tl.sum(tl.where(index[None, :] == i, system, 0.0), axis=1)
        taken = tl.sum(factors[:, None] * solved, axis=0)
        solved = tl.where(index[:, None] == i, solved - taken[None, :], solved)
    place = inverse + (row[:, None] * HEADS + head) * BLOCK_TOKENS + index[None, :]
    tl.store(place, solved)


@triton.jit
def delta_block_kernel(
    q, k, v, g, beta, inverse, state, cu_q, kv_len, state_slot, out,
    q_stride, k_stride, v_stride, g_stride, beta_stride, slot_stride, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    LEAST_TOKENS: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program per sequence of LEAST_TOKENS or more, head and BLOCK of its VALUES."""
    blocks: tl.constexpr = (VALUES + BLOCK - 1) // BLOCK
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_KEYS)
    inside = channel < VALUES
    held = key < KEYS
    mask = held[:, None] & inside[None, :]
    start, stop, has_past, slot = sequence_span(cu_q, kv_len, state_slot, tl.program_id(1))
    mine = stop - start >= LEAST_TOKENS
    place = state + slot * slot_stride + head * KEYS * VALUES
    place = place + key[:, None] * VALUES + channel[None, :]
    kept = tl.load(place, mask=mask & has_past & mine, other=0.0)

    group = head // (HEADS // GROUPS) * KEYS
    column = head * VALUES + channel
    index = tl.arange(0, BLOCK_TOKENS)
    first = tl.where(mine, start, stop)
    while first < stop:
        window = first // BLOCK_TOKENS * BLOCK_TOKENS
        token = window + index
        valid = (token >= first) & (token < stop)
        row = token.to(tl.int64)
        vectors = valid[:, None] & held[None, :]
        entries = group + key[None, :]
        writes = tl.load(k + row[:, None] * k_stride + entries, mask=vectors, other=0.0)
        writes = writes.to(tl.float32)
        writes = writes * _lengths(writes, NORMALIZE)[:, None]
        decay = tl.load(g + row * g_stride + head, mask=valid, other=0.0).to(tl.float32)
        strength = tl.load(beta + row * beta_stride + head, mask=valid, other=0.0).to(tl.float32)
        since_start = tl.cumsum(decay, axis=0)
        whole = tl.sum(decay, axis=0)
        decayed = tl.exp(since_start)
        wide = valid[:, None] & inside[None, :]
        value = tl.load(v + row[:, None] * v_stride + column[None, :], mask=wide, other=0.0)
        value = value.to(tl.float32) * strength[:, None]
        solved = tl.load(inverse + (row[:, None] * HEADS + head) * BLOCK_TOKENS + index[None, :],
                         mask=valid[:, None], other=0.0)  # fmt: skip

        # Rows of other sequences hold zeros from here on.
        predicting = writes * (strength * decayed)[:, None]
        wanted = value - tl.dot(predicting, kept, input_precision=PRECISION)
        correction = tl.dot(solved, wanted, input_precision=PRECISION)
        reads = tl.load(q + row[:, None] * q_stride + entries, mask=vectors, other=0.0)
        reads = reads.to(tl.float32)
        reads = reads * (_lengths(reads, NORMALIZE) * scale)[:, None]
        scores = tl.dot(reads, tl.trans(writes), input_precision=PRECISION)
        between = since_start[:, None] - since_start[None, :]
        between = tl.where(index[:, None] >= index[None, :], between, -1e30)
        result = tl.dot(scores * tl.exp(between), correction, input_precision=PRECISION)
        result = tl.dot(reads * decayed[:, None], kept, acc=result, input_precision=PRECISION)
        until_end = writes * tl.exp(whole - since_start)[:, None]
        added = tl.dot(tl.trans(until_end), correction, input_precision=PRECISION)
        kept = kept * tl.exp(whole) + added
        target = out + row[:, None] * (HEADS * VALUES) + column[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=wide)
        first = window + BLOCK_TOKENS
    tl.store(place, kept, mask=mask & mine)
