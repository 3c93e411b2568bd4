"""What kernels over packed sequences share: where a sequence lies and where its state is."""

import triton
import triton.language as tl


@triton.jit
def sequence_span(cu_q, kv_len, state_slot, sequence):
    """First token and the one after the last, whether there is a past, and the cache's row."""
    start = tl.load(cu_q + sequence)
    stop = tl.load(cu_q + sequence + 1)
    has_past = (stop > start) & (tl.load(kv_len + sequence) != stop - start)
    slot = tl.load(state_slot + sequence).to(tl.int64)
    return start, stop, has_past, slot


@triton.jit
def sequence_of(token, cu_q, sequences, SEARCH_STEPS: tl.constexpr):
    """The sequence [n] that holds each token [n]: the last one that does not start after it.

    2 ** SEARCH_STEPS is at least `sequences`. Tokens past the last sequence get the last.
    """
    low = token * 0
    high = low + sequences
    for _ in tl.static_range(SEARCH_STEPS):
        middle = (low + high) // 2
        starts_after = tl.load(cu_q + middle) > token
        low = tl.where(starts_after, low, middle)
        high = tl.where(starts_after, middle, high)
    return low
