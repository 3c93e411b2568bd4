"""Routing: which replica a prompt goes to. Pure rules and one index; nothing here knows a server.

A prompt's blocks are named by the hashes that the engine's prefix cache has for its pages, salt
included, so two tenants' equal prompts are different ones here, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..runtime.pages import page_hash, root_hash

OVERLOAD_RATIO = 1.5
"""SGLang's `balance_rel_threshold`."""


@dataclass(frozen=True)
class Candidate:
    """A replica as the rule sees it. All but the last are tokens."""

    load: int
    """Of its open requests, running and waiting."""
    known: int
    """Of the prompt, that it has likely cached."""
    step: int
    """That it computes in one step, at most."""
    turn: int
    """When it was last chosen; smaller is longer ago."""


def choose(candidates: Sequence[Candidate]) -> int:
    """The index of the replica that a prompt goes to.

    It is the one that knows the longest prefix of the prompt, unless it is overloaded against the
    least loaded one: it has more than 1.5 times its tokens, and more of them than it by what the
    prefix saves and one step. Otherwise it is the least loaded one; of equal ones, the one that was
    chosen longest ago.

    This is SGLang's cache-aware policy (https://docs.sglang.ai/advanced_features/router.html) with
    two changes. Load is counted in tokens, because requests differ by orders of magnitude in what
    they cost; so a step's budget stands where SGLang has 64 requests (`balance_abs_threshold`):
    that much behind costs a step. And a longer prefix is worth a longer queue, as in NVIDIA
    Dynamo's cost of a worker (tokens to prefill there + tokens active there).
    """
    everyone = range(len(candidates))
    least = min(everyone, key=lambda at: (candidates[at].load, candidates[at].turn))
    most = max(candidate.known for candidate in candidates)
    if most == 0:
        return least
    holders = [at for at in everyone if candidates[at].known == most]
    best = min(holders, key=lambda at: (candidates[at].load, candidates[at].turn))
    return least if is_overloaded(candidates[best], candidates[least].load) else best


def is_overloaded(candidate: Candidate, least: int) -> bool:
    """Whether waiting there costs more than its prefix saves; least: tokens of the least loaded."""
    slack = candidate.step + candidate.known
    return candidate.load > OVERLOAD_RATIO * least and candidate.load > least + slack


def block_hashes(token_ids: Sequence[int], block_size: int, cache_salt: str | None) -> list[bytes]:
    """Names of the full blocks of a prompt, as the engine's prefix cache names their pages (1 µs
    each).

    For models whose keys depend on the length of the prompt, the engine tells more prompts apart;
    a replica may then be thought to know what it does not.
    """
    tokens = np.array(token_ids, dtype=np.int64)
    hashes = [root_hash(cache_salt)]
    for end in range(block_size, len(tokens) + 1, block_size):
        hashes.append(page_hash(hashes[-1], tokens[end - block_size : end]))
    return hashes[1:]


class PrefixIndex:
    """Blocks of the prompts that one replica was sent: as many as its cache can hold.

    The engine drops pages in the same order (least recently used first, ends before beginnings),
    but its cache also holds what was generated, so the index may claim a block that is gone. That
    costs a worse choice, never a wrong answer, and saves a message for every page.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._blocks: dict[bytes, None] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def known(self, hashes: Sequence[bytes]) -> int:
        """How many of a prompt's first blocks are in it."""
        for count, block in enumerate(hashes):
            if block not in self._blocks:
                return count
        return len(hashes)

    def add(self, hashes: Sequence[bytes]) -> None:
        """Takes in a prompt's blocks, of one longer than all that fits its beginning."""
        for block in reversed(hashes[: self.capacity]):
            self._blocks.pop(block, None)
            self._blocks[block] = None
        while len(self._blocks) > self.capacity:
            del self._blocks[next(iter(self._blocks))]
