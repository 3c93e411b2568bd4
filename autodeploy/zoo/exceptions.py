"""Config fields whose names or defaults mislead the tiny-config maker, by model type.

Data of the zoo only: nothing that deploys a model reads it. A default of None that the model
cannot run with, or sizes that must agree with each other in a way their names do not tell.
"""

from __future__ import annotations

from typing import Any

_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "n_routed_experts": 8}
_ROPE: dict[str, Any] = {"rope_theta": 10000.0, "rope_type": "default"}

LEAST_LAYERS: dict[str, int] = {"zamba": 4, "zamba2": 13}
"""Where a block is shared by several depths: two of them have to be there."""

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 20,
        "rope_parameters": {
            kind: {**_ROPE, "mrope_section": [4, 2, 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": 64,
            "ffn_hidden_size": 64,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "deepseek_v2": {**_MOE, "first_k_dense_replace": 1},
    "dots1": {**_MOE, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_text": {"head_dim": 24},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "gemma4_text": {"num_kv_shared_layers": 4},
    "granitemoehybrid": {"mamba_n_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [16, 48],
        "axial_pos_shape": [16, 16],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "hash_seed": 0,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 38,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {"mamba_headdim": 16, "attention_hidden_size": 128, "attention_head_dim": 32},
}
