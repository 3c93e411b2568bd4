"""Marks show what a model itself would keep per token, and change nothing."""

import pytest
from tiny_models import tiny_model

from autodeploy.errors import CaptureError
from autodeploy.transforms.capture.cache_marker import marks
from autodeploy.transforms.capture.export import CaptureOptions, capture
from autodeploy.transforms.pipeline import run_recipe
from autodeploy.transforms.recipe import load_recipe
from autodeploy.transforms.verify import SequenceCheck, reference_logits

MARKED = CaptureOptions(cache_marker=True)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "mixtral"])
def test_every_attention_layer_is_marked_and_the_graph_stays_exact(name):
    model = tiny_model(name)
    program = capture(model, MARKED)
    found = marks(program)
    assert [m.layer for m in found] == list(range(model.config.num_hidden_layers))
    check = SequenceCheck(reference_logits(model))
    check.prove(program)
    run_recipe(program, load_recipe("default"), check=check)
    assert marks(program) == []


def test_latent_attention_shows_its_latent_and_not_the_expanded_keys():
    model = tiny_model("deepseek_v3")
    program = capture(model, MARKED)
    for mark in marks(program):
        latent, rotated = mark.key.meta["val"], mark.value.meta["val"]
        assert (latent.shape[1], latent.shape[3]) == (1, model.config.kv_lora_rank)
        assert rotated.shape[3] == model.config.qk_rope_head_dim
    SequenceCheck(reference_logits(model)).prove(program)


def test_recurrent_layers_refuse_the_marker_with_a_reason():
    with pytest.raises(CaptureError):
        capture(tiny_model("mamba2"), MARKED)
