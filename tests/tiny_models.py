"""Tiny models of many architectures, built from config classes, with weights of unit gain.

Random initial weights of transformers are so small that attention hardly matters; these are
scaled so that a wrong mask, position or cache row shows in the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from autodeploy.transforms.verify.twin import randomise

_COMMON: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip

_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 12, "head_dim": None,
}  # fmt: skip
_EXPERTS = {
    "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "moe_intermediate_size": 32,
}  # fmt: skip

LATENT: dict[str, dict[str, Any]] = {
    "deepseek_v2": _LATENT | _EXPERTS,
    "deepseek_v3": _LATENT | _EXPERTS,
    "glm4_moe_lite": _LATENT | _EXPERTS,
    "axk1": _LATENT | _EXPERTS,
    "minicpm3": _LATENT,
    "youtu": _LATENT,
    "kimi_linear": _LATENT | _EXPERTS | {
        "num_experts": 8, "layer_types": ["linear_attention", "full_attention"],
        "linear_num_heads": 4, "linear_head_dim": 16,
    },
}  # fmt: skip
"""Architectures with multi-head latent attention, and what makes them tiny."""

_SPECIFIC: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "phi3": {},
    "gemma3_text": {
        "sliding_window": 5, "num_hidden_layers": 3, "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "deepseek_v3": LATENT["deepseek_v3"],
    "mamba2": {
        "num_heads": 8, "state_size": 16, "expand": 2, "n_groups": 2, "chunk_size": 8,
        "intermediate_size": None,
    },
    "qwen3_next": {
        "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "falcon_h1": {
        "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16,
        "mamba_n_groups": 1, "mamba_chunk_size": 8, "mamba_expand": 2,
    },
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
}  # fmt: skip

ARCHITECTURES = (*_SPECIFIC, "gpt2")


def tiny_config(name: str, **changes: Any) -> Any:
    """The config of a tiny model; `changes` win over the defaults here."""
    if name == "gpt2":
        values: dict[str, Any] = {
            "vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256,
            "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
        }  # fmt: skip
    else:
        values = {**_COMMON, **(LATENT | _SPECIFIC).get(name, {})}
    values.update(changes)
    keep_none = ("sliding_window", "q_lora_rank")
    return AutoConfig.for_model(
        name, **{k: v for k, v in values.items() if v is not None or k in keep_none}
    )


def tiny_model(name: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A tiny float32 model in eval mode with weights of unit gain."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(name, **changes)).eval()
        randomise(model)
    return model
