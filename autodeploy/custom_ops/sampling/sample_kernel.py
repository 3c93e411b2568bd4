"""The kernel of sample_rows: one program per row, which reads it a few times.

Nothing is sorted. Tokens are compared by a key, an integer in the order of their logits. The cut
of top-k or top-p is found by dividing an interval of keys: one reading of the row gives the mass
(the count, or the sum of weights) above WAYS keys, and leaves one of WAYS + 1 parts. 16-bit logits
have 16-bit keys, so five readings are enough for them. Sums have a fixed order, whatever the
batch.
"""

import triton
import triton.language as tl


@triton.jit
def ordered(x, SHIFT: tl.constexpr):
    """float32 -> int32 that compare alike; the lowest SHIFT bits, zero in x, are left out."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> SHIFT


@triton.jit
def logit_of(key, SHIFT: tl.constexpr):
    """The inverse of `ordered`: a scalar int64 -> float32."""
    shifted = (key << SHIFT).to(tl.int32)
    bits = tl.where(shifted < 0, (shifted ^ 0x7FFFFFFF) >> SHIFT << SHIFT, shifted)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def read(start, column, vocab):
    """Logits at `column` as float32; -inf outside the vocabulary."""
    inside = column < vocab
    x = tl.load(start + column, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, x, float("-inf"))


@triton.jit
def search(
    start,
    vocab,
    best,
    scale,
    low,
    high,
    needed,
    BY_WEIGHT: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The largest key of [low, high) from which on there is a mass of at least `needed`.

    And the mass above that key, float64. `low` if none has as much. low, high scalars of int64,
    nothing is at or above `high`; needed float64, positive.
    """
    lane = tl.arange(0, BLOCK)
    way = tl.arange(0, WAYS)
    above = needed * 0.0
    while high - low > 1:
        step = (high - low + WAYS) // (WAYS + 1)
        edge = tl.minimum(low + (way + 1) * step, high)
        edge_key = edge.to(tl.int32)
        sums = tl.zeros([WAYS, BLOCK], tl.float32)
        for at in tl.range(0, vocab, BLOCK, num_stages=STAGES):
            x = read(start, at + lane, vocab)
            key = ordered(x, SHIFT)
            if BY_WEIGHT:
                value = tl.exp2((x - best) * scale)
            else:
                value = tl.full([BLOCK], 1.0, tl.float32)
            sums += tl.where(key[None, :] >= edge_key[:, None], value[None, :], 0.0)
        mass = tl.sum(sums.to(tl.float64), 1)
        enough = tl.sum((mass >= needed).to(tl.int32), 0)
        # Mass falls from edge to edge: the key is between the last with enough and the next.
        last = tl.sum(tl.where(way == enough - 1, edge, 0), 0)
        following = tl.sum(tl.where(way == enough, edge, 0), 0)
        above = tl.where(enough < WAYS, tl.sum(tl.where(way == enough, mass, 0.0), 0), above)
        low = tl.where(enough > 0, last, low)
        high = tl.where(enough < WAYS, following, high)
    return low, above


@triton.jit
def draw(
    start,
    vocab,
    best,
    scale,
    cut,
    room,
    min_p,
    number,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Inverts the cumulative distribution of the tokens that are left at `number`; int64.

    Left are those above the key `cut` (int64) and the first `room` (int64) of those at it, as far
    as they weigh at least min_p. First block by block, then inside one block.
    """
    lane = tl.arange(0, BLOCK)
    slot = tl.arange(0, BLOCKS)
    cut_key = cut.to(tl.int32)
    cut_weight = tl.exp2((logit_of(cut, SHIFT) - best) * scale).to(tl.float64)
    sums = tl.zeros([BLOCKS], tl.float64)
    ties = tl.zeros([BLOCKS], tl.int32)
    for at in tl.range(0, vocab, BLOCK, num_stages=STAGES):
        x = read(start, at + lane, vocab)
        key = ordered(x, SHIFT)
        weight = tl.exp2((x - best) * scale)
        likely = weight >= min_p
        over = tl.sum(tl.where((key > cut_key) & likely, weight, 0.0).to(tl.float64), 0)
        tied = tl.sum(((key == cut_key) & likely).to(tl.int32), 0)
        here = slot == at // BLOCK
        sums = tl.where(here, over, sums)
        ties = tl.where(here, tied, ties)
    earlier = tl.cumsum(ties, 0) - ties
    staying = tl.minimum(tl.maximum(room - earlier, 0), ties)
    sums += tl.where(staying > 0, staying.to(tl.float64) * cut_weight, 0.0)
    cumulative = tl.cumsum(sums, 0)
    target = number * tl.max(cumulative, 0)
    block = tl.sum((cumulative <= target).to(tl.int32), 0)
    # Where rounding left the target at the last sum: the last that added any.
    block = tl.minimum(block, tl.max(tl.where(sums > 0, slot, 0), 0))
    target -= tl.sum(tl.where(slot == block - 1, cumulative, 0.0), 0)
    room -= tl.sum(tl.where(slot == block, earlier, 0), 0)

    x = read(start, block * BLOCK + lane, vocab)
    key = ordered(x, SHIFT)
    weight = tl.exp2((x - best) * scale)
    tied_here = key == cut_key
    likely = weight >= min_p
    rank = tl.cumsum((tied_here & likely).to(tl.int32), 0)
    left = ((key > cut_key) | (tied_here & (rank <= room))) & likely
    kept = tl.where(left, weight, 0.0).to(tl.float64)
    place = tl.sum((tl.cumsum(kept, 0) <= target).to(tl.int32), 0)
    place = tl.minimum(place, tl.max(tl.where(kept > 0, lane, 0), 0))
    return (block * BLOCK + place).to(tl.int64)


@triton.jit
def sample_kernel(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    numbers,
    tokens,
    vocab,
    stride,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    WAYS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Arguments as in sample_rows; SHIFT: zero bits at the end of a logit made float32."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    lane = tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    temperature = tl.load(temperatures + row)
    if temperature > 0.0:
        most = tl.full([BLOCK], float("-inf"), tl.float32)
        for at in tl.range(0, vocab, BLOCK, num_stages=STAGES):
            x = read(start, at + lane, vocab)
            most = tl.maximum(most, tl.where(x != x, float("inf"), x))
        best = tl.max(most, 0)
        if (best > float("-inf")) & (best < float("inf")):
            top_k = tl.load(top_ks + row)
            top_p = tl.load(top_ps + row)
            min_p = tl.load(min_ps + row)
            number = tl.load(numbers + row)
            scale = 1.4426950408889634 / temperature
            # e ** -104 is 0 in float32: what is below is never drawn.
            low = ordered(best - 104.0 * temperature, SHIFT).to(tl.int64)
            high = ordered(best, SHIFT).to(tl.int64) + 1
            cut = low * 0 - 2147483648
            room = low * 0 + vocab
            if (top_k > 0) & (top_k < vocab):
                cut, _ = search(
                    start, vocab, best, scale, low, high, top_k.to(tl.float64),
                    False, SHIFT, BLOCK, WAYS, STAGES,
                )  # fmt: skip
            if top_p < 1.0:
                low = tl.maximum(low, cut)
                low_key = low.to(tl.int32)
                sums = tl.zeros([BLOCK], tl.float32)
                for at in tl.range(0, vocab, BLOCK, num_stages=STAGES):
                    x = read(start, at + lane, vocab)
                    weight = tl.exp2((x - best) * scale)
                    sums += tl.where(ordered(x, SHIFT) >= low_key, weight, 0.0)
                needed = tl.sum(sums.to(tl.float64), 0) * top_p
                needed = tl.where(needed > 0.0, needed, 1e-30)
                cut, above = search(
                    start, vocab, best, scale, low, high, needed,
                    True, SHIFT, BLOCK, WAYS, STAGES,
                )  # fmt: skip
                weight = tl.exp2((logit_of(cut, SHIFT) - best) * scale).to(tl.float64)
                most_room = vocab * weight
                gap = tl.minimum(needed - above, most_room)
                wanted = tl.where(weight > 0.0, gap / weight, vocab)
                room = tl.maximum(tl.ceil(wanted).to(tl.int64), 1)
            token = draw(
                start, vocab, best, scale, cut, room, min_p, number,
                SHIFT, BLOCK, BLOCKS, STAGES,
            )  # fmt: skip
            tl.store(tokens + row, token)
        else:
            tl.store(tokens + row, -1)
