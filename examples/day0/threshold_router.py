"""A model whose router gives each token as many experts as it needs, in a Python loop.

A token takes experts from the likeliest on until their probabilities add up to a threshold, so
how many it takes depends on the token. The layer loops over the experts that were hit, with
shapes that depend on the data. Attention goes through transformers' interface.
"""

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM


class ThresholdConfig(LlamaConfig):
    model_type = "day0_threshold"

    def __init__(self, num_experts=6, threshold=0.6, **kwargs):
        self.num_experts, self.threshold = num_experts, threshold
        super().__init__(**kwargs)


class ThresholdExperts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.threshold = config.threshold
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(config.hidden_size, config.intermediate_size, bias=False),
                nn.SiLU(),
                nn.Linear(config.intermediate_size, config.hidden_size, bias=False),
            )
            for _ in range(config.num_experts)
        )

    def forward(self, hidden_states):
        flat = hidden_states.flatten(0, 1)
        chances = self.router(flat).softmax(-1)
        ordered, index = chances.sort(-1, descending=True)
        taken = (ordered.cumsum(-1) - ordered) < self.threshold
        weights = torch.zeros_like(chances).scatter(1, index, ordered * taken)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = weights[:, number].nonzero().flatten()
            if len(rows):
                out[rows] += expert(flat[rows]) * weights[rows, number, None]
        return out.view_as(hidden_states)


class ThresholdForCausalLM(LlamaForCausalLM):
    config_class = ThresholdConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = ThresholdExperts(config)
        self.post_init()


def build():
    """A small random model."""
    torch.manual_seed(0)
    config = ThresholdConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.1,
    )  # fmt: skip
    return ThresholdForCausalLM(config).eval()
