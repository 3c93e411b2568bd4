"""The twin has every kind of layer, the same widths, and catches what a transform breaks."""

from dataclasses import dataclass

import pytest
import torch
from tiny_models import tiny_model

from autodeploy import ladder
from autodeploy.errors import VerificationError
from autodeploy.ladder import build_runner, verify_on_twin
from autodeploy.transforms.recipe import load_recipe
from autodeploy.transforms.transform import TRANSFORMS, Transform, register_transform
from autodeploy.transforms.verify.twin import layer_list, layers_needed, twin_of


@pytest.mark.parametrize(
    ("name", "changes", "layers"),
    [
        ("llama", {"num_hidden_layers": 7}, 1),
        (
            "gemma3_text",
            {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 3
             + ["full_attention"] + ["sliding_attention"] * 2},
            4,
        ),
        ("deepseek_v3", {"num_hidden_layers": 5, "first_k_dense_replace": 2}, 3),
        ("gpt2", {"n_layer": 5}, 1),
    ],
)  # fmt: skip
def test_a_twin_keeps_one_layer_of_each_kind_and_all_widths(name, changes, layers):
    model = tiny_model(name, **changes)
    assert layers_needed(layer_list(model)) == layers
    twin = twin_of(model.bfloat16())
    assert type(twin) is type(model)
    assert len(layer_list(twin)) == layers
    for ours, theirs in zip(layer_list(twin), layer_list(model), strict=False):
        shapes = [p.shape for p in ours.parameters()]
        assert shapes == [p.shape for p in theirs.parameters()]
        assert {p.dtype for p in ours.parameters()} == {torch.float32}
    verify_on_twin(model, load_recipe("default"))


def test_a_vocabulary_is_cut_and_the_user_s_config_is_not():
    model = tiny_model("llama", vocab_size=2000, eos_token_id=1900)
    twin = twin_of(model)
    assert twin.config.vocab_size == 512
    assert (model.config.vocab_size, model.config.eos_token_id) == (2000, 1900)


def test_a_broken_transform_is_caught_on_the_twin_of_a_bfloat16_model(monkeypatch):
    @register_transform("nudge")
    @dataclass(frozen=True)
    class Nudge(Transform):
        def sites(self, program):
            return ()

        def finish(self, program):
            for node in program.graph.nodes:
                if node.target == torch.ops.autodeploy.attention.default:
                    # A per-mille error: lost in bfloat16, plain in float32.
                    node.args = (*node.args[:4], node.args[4] * 1.001, *node.args[5:])

    recipe = load_recipe(
        {"extends": "default", "insert": [{"after": "canonicalize", "step": "nudge"}]}
    )
    try:
        with pytest.raises(VerificationError, match="after step 'nudge'"):
            build_runner(tiny_model("llama").bfloat16(), recipe, verify=True)
    finally:
        del TRANSFORMS["nudge"]


def test_a_large_model_is_verified_on_its_twin(monkeypatch, caplog):
    monkeypatch.setattr(ladder, "TWIN_FROM_PARAMETERS", 1000)
    with caplog.at_level("INFO", "autodeploy"):
        build_runner(tiny_model("llama"), load_recipe("default"), verify=True)
    assert "on a twin of LlamaForCausalLM" in caplog.text
