"""A model with attention code of its own and a mask nobody has seen.

Each token sees itself, the three before it, and every fifth token of the whole sequence. No
interface of transformers is used: scores, mask and softmax are written out in the layer. The
cache is transformers', as remote code usually has it.
"""

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class StridedConfig(PreTrainedConfig):
    model_type = "day0_strided"

    def __init__(self, vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                 near=3, stride=5, max_position_embeddings=512, **kwargs):  # fmt: skip
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.near, self.stride = near, stride
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)


class StridedAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, past_key_values=None):
        batch, length, width = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, length, 3, self.heads, -1).transpose(1, 3)
        query, key, value = qkv.unbind(2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        at = torch.arange(key.shape[2] - length, key.shape[2], device=key.device)[:, None]
        seen = torch.arange(key.shape[2], device=key.device)[None, :]
        near = (seen <= at) & (seen >= at - self.config.near)
        far = (seen <= at) & (seen % self.config.stride == 0)
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        scores = scores.masked_fill(~(near | far), float("-inf"))
        mixed = scores.softmax(-1) @ value
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class StridedLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.hidden_size)
        self.attention = StridedAttention(config, layer_idx)
        self.norm_2 = nn.LayerNorm(config.hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden_size, 4 * config.hidden_size),
            nn.GELU(),
            nn.Linear(4 * config.hidden_size, config.hidden_size),
        )

    def forward(self, hidden_states, past_key_values=None):
        hidden_states = hidden_states + self.attention(self.norm_1(hidden_states), past_key_values)
        return hidden_states + self.mlp(self.norm_2(hidden_states))


class StridedForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = StridedConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            StridedLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, past_key_values=None, use_cache=False, **kwargs):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        hidden_states = self.embedding(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, past_key_values)
        logits = self.lm_head(self.norm(hidden_states))
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


def build():
    """A small random model."""
    torch.manual_seed(0)
    return StridedForCausalLM(StridedConfig()).eval()
