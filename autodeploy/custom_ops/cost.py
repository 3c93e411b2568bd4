"""Cost: what a step must read and compute at the least, as plain numbers that add up.

An op states the cost of one call (`Op.cost`), a program's is the sum over its nodes. Bytes that
only one kernel passes to the next are left out: a fused program would not move them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class AttentionCost:
    """Attention layers that see the same keys. window, chunk: as in `attention`; 0 = none."""

    key_bytes: int
    """Read from the caches for one key that is seen."""
    pair_flops: int
    """For one query and one key: q·k and the weighted sum of v, over all heads."""
    window: int = 0
    chunk: int = 0

    def keys(self, length: float) -> float:
        """Keys that the last of `length` tokens sees; on average over a chunk's positions."""
        if self.window:
            length = min(length, self.window)
        return min(length, (self.chunk + 1) / 2) if self.chunk else length

    def pairs(self, length: int) -> int:
        """Query-key pairs of a prompt of `length` tokens, all computed."""
        if self.window:
            full = min(length, self.window)
            return full * (full + 1) // 2 + (length - full) * self.window
        if self.chunk:
            whole, rest = divmod(length, self.chunk)
            return whole * self.chunk * (self.chunk + 1) // 2 + rest * (rest + 1) // 2
        return length * (length + 1) // 2


@dataclass(frozen=True)
class ExpertsCost:
    """Layers with as many experts each, of which every token visits `chosen`."""

    expert_bytes: int
    """Of one expert of every such layer together."""
    experts: int
    chosen: int

    def hit(self, tokens: float) -> float:
        """Experts of a layer that `tokens` tokens visit, expected under uniform routing."""
        return self.experts * (1 - (1 - min(1.0, self.chosen / self.experts)) ** tokens)


@dataclass(frozen=True)
class Cost:
    """Of one step of a program, or of a part of it."""

    weight_bytes: int = 0
    """Weights that every step reads whole, the head among them; one that is tied counts once."""
    token_bytes: int = 0
    """Rows of tables, such as the input embedding's, gathered for one token."""
    sequence_bytes: int = 0
    """Recurrent states of one sequence, read and written."""
    token_flops: int = 0
    """For one token, attention over earlier tokens and the head left out."""
    logit_flops: int = 0
    """For one row of logits."""
    attention: tuple[AttentionCost, ...] = ()
    experts: tuple[ExpertsCost, ...] = ()

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.weight_bytes + other.weight_bytes,
            self.token_bytes + other.token_bytes,
            self.sequence_bytes + other.sequence_bytes,
            self.token_flops + other.token_flops,
            self.logit_flops + other.logit_flops,
            _merged_attention((*self.attention, *other.attention)),
            _merged_experts((*self.experts, *other.experts)),
        )


def _merged_attention(parts: Iterable[AttentionCost]) -> tuple[AttentionCost, ...]:
    merged: dict[tuple[int, int], AttentionCost] = {}
    for part in parts:
        kind = part.window, part.chunk
        before = merged.get(kind, replace(part, key_bytes=0, pair_flops=0))
        merged[kind] = replace(
            part,
            key_bytes=before.key_bytes + part.key_bytes,
            pair_flops=before.pair_flops + part.pair_flops,
        )
    return tuple(merged.values())


def _merged_experts(parts: Iterable[ExpertsCost]) -> tuple[ExpertsCost, ...]:
    merged: dict[tuple[int, int], ExpertsCost] = {}
    for part in parts:
        kind = part.experts, part.chosen
        before = merged[kind].expert_bytes if kind in merged else 0
        merged[kind] = replace(part, expert_bytes=before + part.expert_bytes)
    return tuple(merged.values())
