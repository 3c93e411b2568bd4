"""What the compiler tells the runtime about one compiled program: plain data, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .cost import Cost

METADATA: dict[str, str] = {
    "input_ids": "[1, T] int64: the step's new tokens of all sequences, side by side",
    "position_ids": "[1, T] int64: each token's position in its own sequence",
    "known_len": "[1, T] int64: tokens of its sequence that were known when each token was first "
    "computed: the prompt's for its own, position + 1 for later ones (see LengthRule)",
    "logit_index": "[N] int64: rows of T whose logits are needed",
    "cu_q": "[B + 1] int32: where each sequence's new tokens start in T",
    "kv_len": "[B] int32: tokens of each sequence known after this step, new ones included",
    "block_table": "[B, W] int32: page ids of each sequence in the cache group of the site",
    "slot": "[T] int64: page * page_size + offset at which each new token is written",
    "state_slot": "[B] int64: row of each sequence in per-sequence caches",
}
"""Step inputs an op may request by argument name. `block_table` and `slot` are per cache group:
the graph input is `block_table_<group>`."""

PER_GROUP = frozenset({"block_table", "slot"})


@dataclass(frozen=True)
class CacheSpec:
    """One cache tensor of one layer.

    Per token: the tensor is [pages, page_size, *shape]. Per sequence: [slots, *shape].
    A sequence whose first new token has position 0 must be treated as starting from zeros,
    whatever the row holds.
    """

    name: str
    """The argument of the cached op that receives it, such as `k_cache`."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    per: Literal["token", "sequence"]
    window: int = 0
    """Per token only: positions at most `window - 1` before the query are read; 0 = all."""

    @property
    def bytes(self) -> int:
        """Bytes per token, or per sequence."""
        size = self.dtype.itemsize
        for extent in self.shape:
            size *= extent
        return size


@dataclass(frozen=True)
class CacheInput:
    """A graph input that is a cache."""

    input: str
    spec: CacheSpec


@dataclass(frozen=True)
class CacheGroup:
    """Caches that share one block table (per token) or one slot (per sequence)."""

    name: str
    per: Literal["token", "sequence"]
    window: int
    members: tuple[CacheInput, ...]

    @property
    def bytes(self) -> int:
        """Bytes per token, or per sequence, over all members."""
        return sum(member.spec.bytes for member in self.members)


@dataclass(frozen=True)
class LengthRule:
    """How keys depend on the tokens that were known when they were computed (`known_len`).

    Some rotary embeddings have frequencies that depend on the length of the input. All tokens of
    a prompt are then rotated for the prompt's length, each later one for its own position + 1,
    and what is in a cache stays as it was. A model without a rule has keys of token, position
    and the tokens before alone.
    """

    steps: tuple[int, ...] = ()
    """Ascending. Lengths on the same side of each, `<= step` or above, are alike."""
    grows_past: int | None = None
    """Above it no two lengths are alike."""
    recompute_past: int | None = None
    """A sequence that comes to have more tokens is computed anew from its first token, as if all
    tokens it has then were its prompt."""

    def prompt_tokens(self, prompt: int, known: int) -> int:
        """How many of `known` tokens count as one prompt, if `prompt` did at the start."""
        past = self.recompute_past
        return past + 1 if past is not None and prompt <= past < known else prompt

    def alike(self, length: int) -> int:
        """The smallest length with the same keys: what tells apart tokens otherwise equal."""
        if self.grows_past is not None and length > self.grows_past:
            return length
        return max((step + 1 for step in self.steps if step < length), default=1)


@dataclass(frozen=True)
class Contract:
    """What a compiled program takes and what it needs kept between steps."""

    metadata: tuple[str, ...]
    """Names of the step inputs the graph takes (see METADATA), group suffix included."""
    groups: tuple[CacheGroup, ...]
    vocab_size: int
    max_positions: int | None
    """Longest sequence the model is made for; None if it states none."""
    device: torch.device
    dtype: torch.dtype
    max_tokens: int | None = None
    """Most tokens of one step that the graph holds for; None if any number."""
    lengths: LengthRule | None = None
    """None: keys do not depend on how long the prompt was."""
    eager: tuple[str, ...] = ()
    """Ops, with their implementations, that no CUDA graph can hold: the host decides in them."""
    cost: Cost | None = None
    """What a step must read and compute; None: unknown."""
    calls: int = 0
    """Calls of the graph that launch something, a kernel or a few each; 0: unknown."""
    hidden: int | None = None
    """Width of the hidden states that it returns instead of logits; None: it returns logits."""

    @property
    def width(self) -> int:
        """Of the rows that it returns."""
        return self.vocab_size if self.hidden is None else self.hidden

    @property
    def token_groups(self) -> tuple[CacheGroup, ...]:
        return tuple(group for group in self.groups if group.per == "token")

    @property
    def sequence_groups(self) -> tuple[CacheGroup, ...]:
        return tuple(group for group in self.groups if group.per == "sequence")
