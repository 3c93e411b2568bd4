"""Floors: the least seconds a device needs for a program's work, whatever the software.

A step takes at least as long as reading what it reads, and at least as long as computing what it
computes; the larger of the two is the floor (Williams, Waterman and Patterson, 2009, call the
picture a roofline). Nothing is charged for launches, activations or the host.
"""

from __future__ import annotations

from collections.abc import Sequence

from autodeploy.custom_ops.cost import Cost

from .peaks import Peaks


def floor_seconds(cost: Cost, batch: int, kv: float, peaks: Peaks) -> float:
    """One decode step of `batch` sequences of `kv` tokens each, the new one included."""
    return _step_seconds(cost, batch, _key_bytes(cost, kv), _pair_flops(cost, kv), peaks)


def prefill_floor_seconds(cost: Cost, prompts: Sequence[int], peaks: Peaks) -> float:
    """Prompts of these lengths, to the first token of each.

    Weights are charged once, as if all prompts went through in one step.
    """
    tokens = sum(prompts)
    pairs = sum(a.pair_flops * a.pairs(n) for a in cost.attention for n in prompts)
    flops = tokens * cost.token_flops + len(prompts) * cost.logit_flops + pairs
    moved = _weight_bytes(cost, tokens) + tokens * cost.token_bytes
    return max(flops / peaks.flops, moved / peaks.bytes_per_second)


def workload_floor_seconds(
    cost: Cost,
    prompts: Sequence[int],
    outputs: Sequence[int],
    most: int,
    peaks: Peaks,
) -> float:
    """Requests submitted at once, at most `most` running: all prefill, then every decode step.

    prompts, outputs: lengths in tokens. A request that ends makes room for the next one; its
    prefill gives the first token, each decode step one more of every running request.
    """
    seconds = prefill_floor_seconds(cost, prompts, peaks)
    waiting = list(zip(prompts, outputs, strict=True))[::-1]
    running: list[tuple[int, int]] = []
    """Tokens known, and tokens still to come."""
    while waiting or running:
        while waiting and len(running) < most:
            prompt, output = waiting.pop()
            if output > 1:
                running.append((prompt + 1, output - 1))
        if not running:
            continue
        moved = sum(_key_bytes(cost, known) for known, _ in running)
        flops = sum(_pair_flops(cost, known) for known, _ in running)
        count = len(running)
        seconds += _step_seconds(cost, count, moved / count, flops / count, peaks)
        running = [(known + 1, left - 1) for known, left in running if left > 1]
    return seconds


def _step_seconds(
    cost: Cost, batch: int, key_bytes: float, pair_flops: float, peaks: Peaks
) -> float:
    each = cost.token_bytes + cost.sequence_bytes + key_bytes
    moved = _weight_bytes(cost, batch) + batch * each
    flops = batch * (cost.token_flops + cost.logit_flops + pair_flops)
    return max(flops / peaks.flops, moved / peaks.bytes_per_second)


def _weight_bytes(cost: Cost, tokens: float) -> float:
    return cost.weight_bytes + sum(e.expert_bytes * e.hit(tokens) for e in cost.experts)


def _key_bytes(cost: Cost, kv: float) -> float:
    return sum(a.key_bytes * a.keys(kv) for a in cost.attention)


def _pair_flops(cost: Cost, kv: float) -> float:
    return sum(a.pair_flops * a.keys(kv) for a in cost.attention)
