"""Tiny models of every rope type, trained for 16 positions and stretched to 128."""

import copy

import torch
from tiny_models import tiny_model

TRAINED, LONGEST = 16, 128
ROPES = {
    "default": {},
    "linear": {"factor": 8.0},
    "proportional": {"factor": 2.0, "partial_rotary_factor": 0.5},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": TRAINED},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
    "dynamic": {"factor": 8.0},
    "longrope": {
        "short_factor": [1.0 + 0.05 * i for i in range(8)],
        "long_factor": [1.5 + 0.7 * i for i in range(8)],
        "original_max_position_embeddings": TRAINED, "factor": 8.0,
    },
}  # fmt: skip
DROPS_ITS_CACHE = {"phi3", "phimoe"}
"""These compute all tokens anew past 16; their configs take no type but longrope."""
CASES = [(name, kind) for name in ("llama", "qwen3", "gemma3_text") for kind in ROPES]
CASES += [(name, "longrope") for name in sorted(DROPS_ITS_CACHE)]
LONG = [(name, kind) for name, kind in CASES if kind in ("dynamic", "longrope")]
"""Those whose frequencies depend on the length."""


def rope_model(name: str, kind: str) -> torch.nn.Module:
    """A tiny model with this rope type."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, **copy.deepcopy(ROPES[kind])}
    # Dynamic scaling states the trained length here, every other type the stretched one.
    changes = {"max_position_embeddings": TRAINED if kind == "dynamic" else LONGEST}
    if name == "gemma3_text":
        other = {"rope_type": "default", "rope_theta": 500.0}
        rope = {"full_attention": rope, "sliding_attention": other}
    if name in DROPS_ITS_CACHE:
        changes["original_max_position_embeddings"] = TRAINED
    if name == "phimoe":
        rope |= {"short_mscale": 1.1, "long_mscale": 1.3}
        changes |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    return tiny_model(name, rope_parameters=rope, **changes)


def generated(
    model: torch.nn.Module, prompt: list[int], count: int, use_cache: bool = True
) -> list[int]:
    """What `generate` gives on a model that has not run before.

    use_cache: a model that drops its cache goes on from the last token alone then (transformers
    5.17 slices the input before the cache is dropped); what is meant shows without a cache.
    """
    model = copy.deepcopy(model)

    def forget(module: torch.nn.Module, _: object) -> None:
        # transformers 5.17 fails at the second long input of a LongRoPE per layer type.
        for name in [n for n in vars(module) if n.endswith("_attention_long_inv_freq")]:
            delattr(module, name)

    for module in model.modules():
        if hasattr(module, "rope_type"):
            module.register_forward_pre_hook(forget)
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=count, eos_token_id=None,
            pad_token_id=0, use_cache=use_cache,
        )  # fmt: skip
    return ids[0, len(prompt) :].tolist()
