"""Workloads that benchmarks are stated in: the same every time, by seed."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """Requests by prompt token ids and number of output tokens."""

    prompts: tuple[list[int], ...]
    outputs: tuple[int, ...]

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def output_tokens(self) -> int:
        return sum(self.outputs)


def ragged(
    requests: int, prompt: tuple[int, int], output: tuple[int, int], vocab: int, seed: int = 0
) -> Workload:
    """Prompt and output lengths uniform in the given ranges, ends included; random ids."""
    source = random.Random(seed)
    prompts = tuple(
        [source.randrange(vocab) for _ in range(source.randint(*prompt))] for _ in range(requests)
    )
    return Workload(prompts, tuple(source.randint(*output) for _ in range(requests)))


def a256(vocab: int) -> Workload:
    """256 requests; prompts and outputs of 100 to 1024 tokens: all prompts are drawn first."""
    return ragged(256, (100, 1024), (100, 1024), vocab, seed=0)
