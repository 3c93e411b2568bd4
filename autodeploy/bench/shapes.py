"""Shapes that benchmarks are stated in: configs of published models, under the names people use.

Only sizes: weights are random. A config file's fields, without what does not change the work.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..transforms.artifacts import cache_directory
from ..transforms.recipe import suggest

SHAPES: dict[str, dict[str, Any]] = {
    "llama-101m": {
        "model_type": "llama", "hidden_size": 768, "intermediate_size": 2048,
        "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
        "vocab_size": 16384, "max_position_embeddings": 2048, "tie_word_embeddings": False,
        "dtype": "float32",
    },
    "llama-3.1-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    },
    "llama-3.2-1b": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "qwen3-8b": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "vocab_size": 151936,
        "max_position_embeddings": 40960, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16,
        "num_key_value_heads": 16, "kv_lora_rank": 512, "q_lora_rank": None,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "first_k_dense_replace": 1, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
        "routed_scaling_factor": 1.0, "norm_topk_prob": False, "vocab_size": 102400,
        "max_position_embeddings": 32768, "tie_word_embeddings": False,
    },
    "gemma-3-4b": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
        "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 1024,
        "vocab_size": 262208, "max_position_embeddings": 131072, "tie_word_embeddings": True,
    },
    "mamba2-2.7b": {
        "model_type": "mamba2", "hidden_size": 2560, "num_hidden_layers": 64, "state_size": 128,
        "num_heads": 80, "head_dim": 64, "expand": 2, "n_groups": 1, "conv_kernel": 4,
        "chunk_size": 256, "vocab_size": 50288, "tie_word_embeddings": True,
    },
    "qwen3-next-2b": {
        "model_type": "qwen3_next", "hidden_size": 1024, "intermediate_size": 3072,
        "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256,
        "num_hidden_layers": 16, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 256, "linear_num_key_heads": 8, "linear_num_value_heads": 16,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 151936,
        "max_position_embeddings": 32768, "tie_word_embeddings": False,
    },
    "qwen3-next-27b": {
        "model_type": "qwen3_next", "hidden_size": 2048, "intermediate_size": 5120,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 2,
        "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "num_experts": 512,
        "num_experts_per_tok": 10, "norm_topk_prob": True, "vocab_size": 151936,
        "max_position_embeddings": 32768, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""By name: published shapes, and two hybrids of one family. `qwen3-next-27b` is a third of the
published one's layers, which are as large as there; `qwen3-next-2b` is a small one."""


def dummy_checkpoint(name: str) -> Path:
    """A directory with the config.json of a shape, or of a path, and no weights.

    name: of SHAPES, or the path of a directory with a config.json, or of such a file.

    Raises:
        ConfigError: it is none of them.
    """
    path = Path(name)
    if (path / "config.json").is_file():
        return path
    if path.is_file():
        return _written(path.stem, json.loads(path.read_text()))
    if name not in SHAPES:
        raise ConfigError(
            f"--dummy takes a config.json, its directory, or a shape, not '{name}'"
            f"{suggest(name, list(SHAPES))}; shapes: {', '.join(SHAPES)}"
        )
    return _written(name, {"dtype": "bfloat16", **SHAPES[name]})


def _written(name: str, values: dict[str, Any]) -> Path:
    # Always at the same place, so that what is kept for a next start is found.
    folder = cache_directory() / "shapes" / name
    folder.mkdir(parents=True, exist_ok=True)
    no_ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps({**values, **no_ends}, indent=2) + "\n")
    return folder
