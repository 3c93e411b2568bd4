"""Workloads and models that benchmarks are stated in: the same every time, by seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import nn


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


def random_llama(
    hidden: int = 768, layers: int = 12, heads: int = 12, kv_heads: int = 4,
    intermediate: int = 2048, vocab: int = 16384, seed: int = 0,
) -> nn.Module:  # fmt: skip
    """A Llama of random float32 weights; the defaults have 101 M parameters."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config).eval()
