"""Tiny configs: small, of every kind of layer, and sensitive to what they should be."""

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from autodeploy.transforms.verify.twin import layer_list, layers_needed
from autodeploy.zoo.architectures import DECODERS, SAMPLE, all_architectures
from autodeploy.zoo.exceptions import EXCEPTIONS, LEAST_LAYERS
from autodeploy.zoo.measure import tiny_model
from autodeploy.zoo.tiny_config import MAX_POSITIONS, VOCABULARY, tiny_config


def test_the_lists_name_architectures_that_exist():
    known = set(all_architectures())
    assert known >= DECODERS
    assert len(DECODERS) == 139
    assert len(set(SAMPLE)) == 30
    assert known >= set(SAMPLE)
    # A newer transformers than 5.17 has one more.
    assert (set(EXCEPTIONS) | set(LEAST_LAYERS)) - set(CONFIG_MAPPING) <= {"dots3_note_text"}


@pytest.mark.parametrize("name", ["llama", "qwen3_next", "gemma4_text", "jamba", "deepseek_v3"])
def test_every_kind_of_layer_of_the_full_model_is_in_the_tiny_one(name):
    full = CONFIG_MAPPING[name]()
    tiny = tiny_config(full)
    kinds = getattr(full, "layer_types", None)
    if kinds:
        assert set(tiny.layer_types) == set(kinds)
    model = tiny_model(full)
    layers = layer_list(model)
    assert layers_needed(layers) <= len(layers) <= 12
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    assert (tiny.vocab_size, tiny.max_position_embeddings) == (VOCABULARY, MAX_POSITIONS)


def test_ratios_of_heads_are_kept():
    grouped = tiny_config(CONFIG_MAPPING["qwen3"]())
    assert grouped.num_key_value_heads == grouped.num_attention_heads  # as by default there
    assert tiny_config(CONFIG_MAPPING["mistral"]()).num_key_value_heads == 2
    assert tiny_config(CONFIG_MAPPING["gpt_bigcode"]()).multi_query


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_a_dropped_position_or_mask_shows_in_the_logits(name):
    model = tiny_model(CONFIG_MAPPING[name]())
    ids = torch.arange(20, 32)[None]
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        swapped = model(input_ids=ids[:, [1, 0, *range(2, 12)]]).logits
    assert (plain - swapped)[0, -1].abs().max() > 0.01 * plain.abs().max()
    assert 0.3 < plain.std() < 5


def test_a_model_is_the_same_each_time():
    first, second = (tiny_model(CONFIG_MAPPING["llama"]()) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
