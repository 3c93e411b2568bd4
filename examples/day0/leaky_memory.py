"""A model with a recurrent mixer of its own: a leaky memory that new tokens write to.

m_t = decay(x_t) * m_(t-1) + k_t vᵗ_t, read by q_t. A Python loop over time, and a state that the
layer takes as an argument and gives back, which the model keeps in a list.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput


class LeakyConfig(PreTrainedConfig):
    model_type = "day0_leaky"

    def __init__(self, vocab_size=256, hidden_size=64, memory_size=16, num_hidden_layers=2,
                 **kwargs):  # fmt: skip
        self.vocab_size, self.hidden_size, self.memory_size = vocab_size, hidden_size, memory_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**kwargs)


class LeakyMemory(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.query = nn.Linear(config.hidden_size, config.memory_size, bias=False)
        self.key = nn.Linear(config.hidden_size, config.memory_size, bias=False)
        self.value = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.decay = nn.Linear(config.hidden_size, config.memory_size)

    def forward(self, hidden_states, memory=None):
        batch, length, width = hidden_states.shape
        if memory is None:
            memory = hidden_states.new_zeros(batch, self.key.out_features, width)
        decay = torch.sigmoid(self.decay(hidden_states))
        read = []
        for t in range(length):
            x = hidden_states[:, t]
            memory = decay[:, t, :, None] * memory
            memory = memory + self.key(x)[:, :, None] * self.value(x)[:, None, :]
            read.append(torch.einsum("bm,bmw->bw", self.query(x), memory))
        return torch.stack(read, dim=1), memory


class LeakyLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_1 = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.memory = LeakyMemory(config)
        self.norm_2 = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.up = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.down = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, memory=None):
        mixed, memory = self.memory(self.norm_1(hidden_states), memory)
        hidden_states = hidden_states + mixed
        hidden_states = hidden_states + self.down(self.up(self.norm_2(hidden_states)).relu())
        return hidden_states, memory


@dataclass
class LeakyOutput(ModelOutput):
    logits: torch.Tensor | None = None
    state: list | None = None


class LeakyForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = LeakyConfig
    _is_stateful = True

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LeakyLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, state=None, use_cache=False, **kwargs):
        memories = state or [None] * len(self.layers)
        hidden_states = self.embedding(input_ids)
        kept = []
        for layer, memory in zip(self.layers, memories, strict=True):
            hidden_states, memory = layer(hidden_states, memory)
            kept.append(memory)
        logits = self.lm_head(self.norm(hidden_states))
        return LeakyOutput(logits=logits, state=kept if use_cache else None)


def build():
    """A small random model."""
    torch.manual_seed(0)
    return LeakyForCausalLM(LeakyConfig()).eval()
