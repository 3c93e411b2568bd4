"""Kernels that prepare a step's inputs."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def resolve_tokens_kernel(input_ids, tokens, out, count, BLOCK: tl.constexpr):
    """out[i] = input_ids[i], or tokens[-1 - input_ids[i]] where that is negative."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    ids = tl.load(input_ids + at, mask=inside, other=0)
    missing = inside & (ids < 0)
    found = tl.load(tokens + (-1 - ids), mask=missing, other=0)
    tl.store(out + at, tl.where(missing, found, ids), mask=inside)
