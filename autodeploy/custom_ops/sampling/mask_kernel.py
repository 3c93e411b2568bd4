"""Kernel of mask_logits: a block of a row's tokens, and the words that hold their bits."""

import triton
import triton.language as tl


@triton.jit
def mask_kernel(
    logits,
    bits,
    rows,
    vocab,
    stride,
    words,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (m, block) writes -inf to row rows[m]; allowed tokens are left alone."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    mask = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + mask)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    word = tl.load(bits + mask * words + token // 32, mask=inside, other=0)
    forbidden = ((word >> (token % 32)) & 1) == 0
    tl.store(logits + row * stride + token, float("-inf"), mask=inside & forbidden)
