"""Which architectures there are: names of transformers' causal-LM mapping, and a sample of them."""

from __future__ import annotations

DECODERS = frozenset((
    "afmoe", "apertus", "arcee", "aria_text", "axk1", "axk2", "bamba", "biogpt", "bitnet",
    "bloom", "blt", "codegen", "cohere", "cohere2", "cohere2_moe", "cohere_compass_text",
    "cpmant", "ctrl", "cwm", "dbrx", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4",
    "diffllama", "doge", "dots1", "emu3", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe",
    "falcon", "falcon_h1", "falcon_mamba", "flex_olmo", "gemma", "gemma2", "gemma3",
    "gemma3_text", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified",
    "gemma4_unified_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "got_ocr2",
    "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gpt_oss",
    "gptj", "granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid",
    "granitemoeshared", "helium", "hrm_text", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3",
    "hy_v4", "hyperclovax", "inkling_text", "jais2", "jamba", "jetmoe", "kimi_linear", "laguna",
    "lfm2", "lfm2_moe", "llama", "llama4", "llama4_text", "longcat_flash", "mamba", "mamba2",
    "mellum", "mimo_v2_flash", "minicpm3", "minimax", "minimax_m2", "minimax_m3_vl_text",
    "ministral", "ministral3", "mistral", "mixtral", "mllama", "modernbert-decoder", "mpt",
    "nanochat", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe",
    "openai-gpt", "opt", "persimmon", "phi", "phi3", "phi4_multimodal", "phimoe", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text",
    "qwen3_moe", "qwen3_next", "qwen4_exp", "qwen4_exp_text", "recurrent_gemma", "rwkv",
    "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma", "xglm", "xlstm",
    "youtu", "zamba", "zamba2", "zaya",
))  # fmt: skip
"""Decoder language models of transformers 5.17: text in, text out, autoregressive by design. The
other names of its mapping are BERT-likes, decoders of translation, audio and image models, and
draft heads."""

SAMPLE = (
    "llama", "qwen3", "phi3", "gemma3_text", "gemma4_text", "gpt2", "gptj", "bloom", "falcon",
    "gpt_neo", "cohere2", "olmo2", "mixtral", "gpt_oss", "dbrx", "jetmoe", "deepseek_v3",
    "deepseek_v32", "kimi_linear", "llama4_text", "mamba", "mamba2", "zamba2", "falcon_h1",
    "qwen3_next", "recurrent_gemma", "minimax", "lfm2", "zaya", "doge",
)  # fmt: skip
"""One of each kind: dense, gated and shared experts, windows, chunks, sinks, soft caps, position
biases, latent attention, sparse indexers, and every recurrence."""


def all_architectures() -> list[str]:
    """Every name that this transformers maps to a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
