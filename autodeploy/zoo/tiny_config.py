"""A tiny config of any config class: widths shrunk, ratios kept, every kind of layer present.

What a field means is read off its name, as in a glossary: transformers has a few hundred names
for a dozen ideas. A field that matches nothing keeps its value. The few configs whose fields
contradict the glossary are corrected by name in `exceptions.py`, which only the zoo reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from autodeploy.transforms.verify.twin import layer_list, layers_needed

from .exceptions import EXCEPTIONS, LEAST_LAYERS

VOCABULARY = 256
MAX_POSITIONS = 256
_MAX_LAYERS = 12

Values = Mapping[str, Any]


def _at_most(limit: int) -> Callable[[int, Values], int]:
    return lambda value, _: min(value, limit)


def _kv_heads(value: int, values: Values) -> int:
    """4 heads share 4, 2 or 1 kv heads, as they did before."""
    heads = next((values[n] for n in _HEADS if isinstance(values.get(n), int)), value)
    return 4 if value == heads else min(value, 2)


def _head_dim(value: int, values: Values) -> int:
    """Some configs mean the rotated part by it."""
    return 8 if value == values.get("qk_rope_head_dim") else min(value, 16)


def _even(limit: int) -> Callable[[int, Values], int]:
    return lambda value, _: min(value, limit) // 2 * 2 if value > 1 else value


_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")

GLOSSARY: tuple[tuple[str, Callable[[int, Values], int]], ...] = (
    (r".*vocab(_size)?(_per_layer_input|_base)?|vocab_size.*", _at_most(VOCABULARY)),
    (r"(max_position_embeddings|n_positions|n_ctx|max_(seq|sequence|target)_\w+|max_seq_len"
     r"|max_source_positions|model_max_length|context_length)", _at_most(MAX_POSITIONS)),
    (r"original_max_position_embeddings", _at_most(64)),
    (r"(\w+_)?(sliding_window|sliding_window_size|window_size|attention_chunk_size|local_attention"
     r"|attention_window_size|local_window_size)", _even(6)),
    # Few heads would often score exactly 0, and a top-k among equals is anyone's.
    (r"index_n_heads", _at_most(32)),
    (r"index_topk|keep_window_size", _at_most(4)),
    (r"index_block_size|index_topk_blocks|mamba_chunk_size|ssm_chunk_size", _at_most(4)),
    (r"(\w+_)?(num_)?(key_value|kv)_heads|n_head_kv|kv_n_heads", _kv_heads),
    (r"(encoder_|decoder_)?(num_)?(attention_)?heads|n_heads?|(swa_|\w+_)num_attention_heads"
     r"|(linear|index|mamba|ssm)_(num|n)_?(value_)?heads|num_(encoder|decoder)_attention_heads"
     r"|linear_num_heads|mamba_num_heads", _at_most(4)),
    (r"linear_num_key_heads", _at_most(2)),
    (r"qk_rope_head_dim|rotary_dim", _at_most(8)),
    (r"qk_head_dim", _at_most(24)),
    (r"head_dim", _head_dim),
    (r"(\w+_)?(attention_)?head_(dim|size)|dim_head|d_head|kv_channels|qk_nope_head_dim|v_head_dim"
     r"|linear_(key|value)_head_dim|linear_head_dim|mamba_d_head|mamba_head_dim|global_head_dim"
     r"|index_head_dim", _at_most(16)),
    (r"(\w+_)?lora_rank|hc_lowrank|gated_norm_rank|laurel_rank|d_rel", _at_most(16)),
    (r"(state_size|ssm_state_size|mamba_d_state)", _at_most(16)),
    (r"(mamba_)?n_groups", _at_most(2)),
    (r"time_step_rank|mamba_dt_rank", _at_most(8)),
    (r"(moe|expert|shared_expert|moe_shared_expert)_(ffn_)?(intermediate|hidden)_size"
     r"|expert_ffn_hidden_size|hidden_size_per_layer_input|shared_intermediate_size", _at_most(32)),
    (r"(\w+_)?(intermediate|feed_forward)_size(_mlp)?|(\w+_)?ffn_dim|ffn_hidden_size|dim_ff|dff"
     r"|d_ff|n_inner|d_inner|mamba_d_ssm|ple_embed_dim", _at_most(128)),
    (r"num_experts_per_(tok|token)|moe_topk|moe_k|top_k_experts|num_selected_experts", _at_most(2)),
    (r"(moe_)?num_(local_)?experts|n_routed_experts|num_moe_experts|moe_num_experts"
     r"|zero_expert_num", _at_most(8)),
    (r"n_group|num_expert_group", _at_most(2)),
    (r"topk_group", _at_most(1)),
    (r"first_k_dense_replace|num_dense_layers", _at_most(1)),
    (r"num_kv_shared_layers", _at_most(5)),
    (r"hidden_size|hidden_size_global|d_model|n_embd|dim_model|emb_dim|embedding_dim|word_embed_proj_dim"
     r"|(input_|output_)?embedding_size|backbone_hidden_size|lru_width|width|embed_dim"
     r"|attention_hidden_size|cross_attention_hidden_size|hidden_dim", _at_most(64)),
)  # fmt: skip

_DEFAULTS_OF_NONE = {"head_dim": 16, "num_key_value_heads": 4}
_BOOKKEEPING = ("_name_or_path", "transformers_version", "architectures", "output_attentions")

LAYER_COUNTS = re.compile(
    r"num_hidden_layers|n_layers?|num_layers|num_blocks|(decoder|encoder)_layers"
    r"|num_(decoder|encoder)_layers|num_local_layers|num_global_layers|depth"
)
_TOKEN_ID = re.compile(
    r"\w+_token_id|(mask|unk|pad|eos|bos|sep)_(index|id|token_id)|start_token_id"
)


def tiny_config(config: PretrainedConfig) -> PretrainedConfig:
    """A config of the same class whose model has a few thousand weights per layer.

    Raises:
        ValueError: the config class refuses the shrunken values.
    """
    values = _shrink(config)
    full = type(config).from_dict(values)
    with_layers = _keep_layers(full, values)
    tiny = type(config).from_dict(with_layers)
    if getattr(tiny, "is_decoder", True) is False:
        # BERT-likes generate only as decoders.
        tiny.is_decoder = True
    return tiny


def _shrink(config: PretrainedConfig) -> dict[str, Any]:
    """The config's values with every size shrunk, layer counts as they were."""
    values = config.to_dict()
    shrunk = {name: _shrink_field(name, value, values) for name, value in values.items()}
    for name in getattr(config, "sub_configs", {}) or {}:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            shrunk[name] = _shrink(part)
    for name in ("rope_parameters", "rope_scaling", "layer_rope_parameters"):
        if isinstance(shrunk.get(name), dict):
            shrunk[name] = _shrink_rope(shrunk[name], shrunk)
    for name in ("attn_config", "ffn_config"):
        if isinstance(shrunk.get(name), dict):
            inner = shrunk[name]
            shrunk[name] = {k: _shrink_field(k, v, inner) for k, v in inner.items()}
    for layer, changes in (shrunk.get("per_layer_config") or {}).items():
        inner = {k: _shrink_field(k, v, {**values, **changes}) for k, v in changes.items()}
        shrunk["per_layer_config"] = {**shrunk["per_layer_config"], layer: inner}
    for name, missing in _DEFAULTS_OF_NONE.items():
        if name in shrunk and shrunk[name] is None:
            shrunk[name] = missing
    shrunk.update(EXCEPTIONS.get(config.model_type, {}))
    return {name: value for name, value in shrunk.items() if name not in _BOOKKEEPING}


def _shrink_field(name: str, value: Any, values: Values) -> Any:
    if isinstance(value, list) and value and all(type(v) is int for v in value):
        return [_shrink_field(name, v, values) for v in value]
    if type(value) is not int:
        return value
    if _TOKEN_ID.fullmatch(name):
        return value % VOCABULARY if value >= VOCABULARY else value
    for pattern, shrink in GLOSSARY:
        if re.fullmatch(pattern, name):
            return shrink(value, values) if value > 0 else value
    return value


def _shrink_rope(rope: dict[str, Any], values: Values) -> dict[str, Any]:
    """Lists that have one entry per rotated pair get as many as the small heads have."""
    if any(isinstance(inner, dict) for inner in rope.values()):
        return {k: _shrink_rope(v, values) if isinstance(v, dict) else v for k, v in rope.items()}
    shrunk = {k: _shrink_field(k, v, values) for k, v in rope.items()}
    head = values.get("head_dim") or values.get("qk_rope_head_dim") or 16
    pairs = max(1, int(head * (rope.get("partial_rotary_factor") or 1.0)) // 2)
    for name in ("short_factor", "long_factor"):
        if isinstance(shrunk.get(name), list):
            shrunk[name] = shrunk[name][:pairs]
    sections = shrunk.get("mrope_section")
    if isinstance(sections, list):
        rest = pairs - (len(sections) - 1) * (pairs // len(sections))
        shrunk["mrope_section"] = [rest] + [pairs // len(sections)] * (len(sections) - 1)
    return shrunk


def _keep_layers(config: PretrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """Cuts the stack after the first layers in which every kind of layer occurs."""
    counts = _layer_counts(values)
    keep = max(2, min(_MAX_LAYERS, _layers_needed(config)), LEAST_LAYERS.get(config.model_type, 0))
    for path in counts:
        inner, total = _at(values, path[:-1]), _at(values, path)
        for name, value in inner.items():
            if isinstance(value, list) and len(value) == total:
                inner[name] = value[:keep]
            elif isinstance(value, dict) and all(str(k).isdigit() for k in value):
                inner[name] = {k: v for k, v in value.items() if int(k) < keep}
            elif _is_layer_indices(name, value, total):
                inner[name] = [v for v in value if v < keep]
        inner[path[-1]] = min(total, keep)
    return values


def _is_layer_indices(name: str, value: Any, total: int) -> bool:
    if not isinstance(value, list) or not value or any(type(v) is not int for v in value):
        return False
    return "layer" in name and "section" not in name and max(value) < total


def _layer_counts(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _layer_counts(value, (*path, name))
        elif type(value) is int and LAYER_COUNTS.fullmatch(name):
            found.append((*path, name))
    return found


def _at(values: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        values = values[name]
    return values


def _layers_needed(config: PretrainedConfig) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    return layers_needed(layer_list(model))


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights of unit gain, so that a wrong mask, position or scale shows in the logits.

    Vectors are moved a little from where they were, which keeps decays and gates in their range.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    tied = id(getattr(head, "weight", None))
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        if parameter.dim() < 2:
            parameter.add_(noise * 0.1)
        elif id(parameter) in embeddings:
            # As a head, unit weights would make every next token certain: no error would show.
            parameter.copy_(noise * (0.3 if id(parameter) == tied else 1.0))
        elif parameter.dim() == 2 or parameter.std() < 0.5:
            fan_in = parameter.shape[-1] if parameter.dim() < 4 else parameter[0].numel()
            parameter.copy_(noise * fan_in**-0.5)
