"""A kernel for products of some hundred rows with a weight matrix: all programs get equal work.

A tile is BLOCK_N columns of the result for BLOCK_M tokens, and K / BLOCK_K steps long. At some
hundred tokens tiles of a good size come to one or two a multiprocessor, and rounding that up costs
a third. So as many tiles as come out even are dealt to the programs in turn, at least one round
fewer than needed; the steps of those left over are cut into one equal share a program (Stream-K,
Osama et al., 2023). Who is the last to finish a share of a tile adds all of them up.

Tiles of both operands come through TMA, which keeps addresses out of registers and reads zeros past
an edge. The weight is the tall operand of the matrix instruction, the tokens are the wide one.
"""

import triton
import triton.language as tl

from .dot_kernel import finish, residual_tile
from .gemv_kernel import prefetch


@triton.jit
def owner(step, shared, programs):
    """The program whose share holds a step: shares begin at shared * program // programs."""
    return ((step + 1) * programs - 1) // shared


@triton.jit
def tile_at(tile, row_tiles, token_tiles, GROUP: tl.constexpr):
    """Row and token tile. Neighbours share GROUP token tiles, which then stay in the cache."""
    area = GROUP * row_tiles
    begin = tile // area * GROUP
    height = tl.minimum(token_tiles - begin, GROUP)
    inside = tile % area
    return inside // height, begin + inside % height


@triton.jit
def multiply(w, values, total, WIDE: tl.constexpr):
    """total [N, M] plus w [N, K] times values [M, K]."""
    across = tl.trans(values)
    if WIDE:
        w = w.to(tl.float32)
        across = across.to(tl.float32)
    return tl.dot(w, across, total)


@triton.jit(do_not_specialize=["tokens", "outputs"])
def wide_kernel(
    x, weight, rows, bias, residual, out, scratch, arrivals, tokens, outputs,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    EARLY: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [tokens, K], weight [outputs or twice that, K] -> out [tokens, outputs].

    x and weight are descriptors of blocks [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K], rows is the
    weight itself. scratch: float32, two slots a program, for its share of a tile that began before
    its own share and of one that ends after; arrivals: int32 zeros, one per tile that is shared,
    left as zeros. EARLY: bytes of each row of the first tile that are asked for before the wait.
    CHUNK: tokens that shares are added up for at a time.
    WIDE: products of float32, for the interpreter, which has none of bfloat16.
    """
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    AREA: tl.constexpr = BLOCK_N * BLOCK_M
    SLOT: tl.constexpr = AREA * (2 if GATED else 1)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    row_tiles = (outputs + BLOCK_N - 1) // BLOCK_N
    token_tiles = (tokens + BLOCK_M - 1) // BLOCK_M
    tiles = row_tiles * token_tiles
    rounds = tiles // programs
    if rounds * programs != tiles:
        rounds = tl.maximum(rounds - 1, 0)
    dealt = rounds * programs
    shared = (tiles - dealt) * STEPS
    begin = (shared * program) // programs
    end = (shared * (program + 1)) // programs
    turns = rounds
    if end > begin:
        turns = rounds + (end - 1) // STEPS - begin // STEPS + 1

    if EARLY > 0:
        tile = program
        step = 0
        if rounds == 0:
            tile = begin // STEPS
            step = begin % STEPS
        row_tile, token_tile = tile_at(tile, row_tiles, token_tiles, GROUP)
        # From where a share begins there may be fewer bytes left than are asked for.
        ahead = rows + tl.minimum(step * BLOCK_K, K - EARLY // 2)
        prefetch(ahead, row_tile * BLOCK_N, outputs, K, BLOCK_N, EARLY)
        if GATED:
            half = ahead + tl.cast(outputs, tl.int64) * K
            prefetch(half, row_tile * BLOCK_N, outputs, K, BLOCK_N, EARLY)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    for turn in tl.range(0, turns, num_stages=1):
        tile = turn * programs + program
        low = 0
        high = STEPS
        if turn >= rounds:
            number = begin // STEPS + turn - rounds
            low = tl.maximum(begin - number * STEPS, 0)
            high = tl.minimum(end - number * STEPS, STEPS)
            tile = dealt + number
        row_tile, token_tile = tile_at(tile, row_tiles, token_tiles, GROUP)
        row = row_tile * BLOCK_N
        token = token_tile * BLOCK_M

        first = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        second = first
        for step in range(low, high):
            values = x.load([token, step * BLOCK_K])
            w = weight.load([row, step * BLOCK_K])
            first = multiply(w, values, first, WIDE)
            if GATED:
                w = weight.load([outputs + row, step * BLOCK_K])
                second = multiply(w, values, second, WIDE)

        column = row + tl.arange(0, BLOCK_N)
        if high - low == STEPS:
            here = token + tl.arange(0, BLOCK_M)
            added = residual_tile(residual, column, here, tokens, outputs, HAS_RESIDUAL)
            finish(
                first, second, bias, added, out, column, here, tokens, outputs,
                HAS_BIAS, HAS_RESIDUAL, ACTIVATION, GATED,
            )  # fmt: skip
        else:
            number = tile - dealt
            slot = 2 * program + (begin < number * STEPS).to(tl.int32)
            mine = scratch + slot.to(tl.int64) * SLOT
            lane = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M
            across_tile = lane + tl.arange(0, BLOCK_M)[None, :]
            tl.store(mine + across_tile, first)
            if GATED:
                tl.store(mine + AREA + across_tile, second)
            # All threads have stored before one of them says so.
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals + number, 1, sem="acq_rel")
            start = owner(number * STEPS, shared, programs)
            stop = owner(number * STEPS + STEPS - 1, shared, programs) + 1
            if arrived == stop - start - 1:
                tl.store(arrivals + number, 0)
                for chunk in tl.range(0, BLOCK_M, CHUNK, num_stages=1):
                    beside = chunk + tl.arange(0, CHUNK)
                    index = lane + beside[None, :]
                    there = token + beside
                    added = residual_tile(residual, column, there, tokens, outputs, HAS_RESIDUAL)
                    total = tl.zeros((BLOCK_N, CHUNK), tl.float32)
                    other_total = total
                    for other in tl.range(start, stop, num_stages=1):
                        theirs = (shared * other) // programs < number * STEPS
                        theirs = scratch + (2 * other + theirs.to(tl.int32)).to(tl.int64) * SLOT
                        total += tl.load(theirs + index, cache_modifier=".cg")
                        if GATED:
                            other_total += tl.load(theirs + AREA + index, cache_modifier=".cg")
                    finish(
                        total, other_total, bias, added, out, column, there, tokens, outputs,
                        HAS_BIAS, HAS_RESIDUAL, ACTIVATION, GATED,
                    )  # fmt: skip
