"""The kernel of `route`: softmax, the k largest and their sum, of a few tokens per program."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    logits,
    index,
    weights,
    tokens,
    stride,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    SHARED: tl.constexpr,
    GATED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_CHOICES: tl.constexpr,
    PDL: tl.constexpr,
):
    """logits [tokens, EXPERTS], rows `stride` apart -> index, weights [tokens, SHARED + CHOICES].

    SHARED experts, which come before all others, are every token's. GATED: the logit after those of
    the others is their gate.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    expert = tl.arange(0, BLOCK_EXPERTS)
    choice = tl.arange(0, BLOCK_CHOICES)
    mask = (token < tokens)[:, None] & (expert < EXPERTS)[None, :]
    value = tl.load(logits + token[:, None] * stride + expert[None, :], mask=mask, other=0.0)
    value = tl.where((expert < EXPERTS)[None, :], value.to(tl.float32), float("-inf"))
    if GATED:
        gate = tl.load(logits + token * stride + EXPERTS, mask=token < tokens, other=0.0)
    share = tl.exp(value - tl.max(value, axis=1)[:, None])
    share = share / tl.sum(share, axis=1)[:, None]
    # Numbers above zero compare as their bits do, and a warp finds the largest integer in one
    # instruction. Below any probability: what does not exist, and what has been chosen.
    bits = tl.where((expert < EXPERTS)[None, :], share.to(tl.int32, bitcast=True), -1)
    found = tl.zeros([BLOCK_TOKENS, BLOCK_CHOICES], tl.int32)
    weight = tl.zeros([BLOCK_TOKENS, BLOCK_CHOICES], tl.float32)
    for place in tl.static_range(CHOICES):
        best = tl.max(bits, axis=1)
        where = tl.min(tl.where(bits == best[:, None], expert[None, :], BLOCK_EXPERTS), axis=1)
        here = (choice == SHARED + place)[None, :]
        found = tl.where(here, where[:, None], found)
        weight = tl.where(here, best.to(tl.float32, bitcast=True)[:, None], weight)
        bits = tl.where(expert[None, :] == where[:, None], -1, bits)
    if NORMALIZE:
        weight = weight / tl.sum(weight, axis=1)[:, None]
    if SHARED > 0:
        always = (choice < SHARED)[None, :]
        found = tl.where(always, choice[None, :], found + SHARED)
        each = tl.full([BLOCK_TOKENS], 1.0, tl.float32)
        if GATED:
            each = tl.sigmoid(gate.to(tl.float32))
        weight = tl.where(always, each[:, None], weight)
    at = token[:, None] * (SHARED + CHOICES) + choice[None, :]
    kept = (token < tokens)[:, None] & (choice < SHARED + CHOICES)[None, :]
    tl.store(index + at, found.to(tl.int64), mask=kept)
    tl.store(weights + at, weight.to(weights.dtype.element_ty), mask=kept)
