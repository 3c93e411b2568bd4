"""Proofs of models in low precision: rounding is no mistake, and hides none."""

import contextlib

import pytest
import torch
from torch import nn
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from autodeploy import ladder
from autodeploy.errors import CaptureError, NotCausalError
from autodeploy.ladder import build_runner
from autodeploy.transforms.recipe import load_recipe
from autodeploy.transforms.verify import Reference, SequenceCheck, reference_logits
from autodeploy.transforms.verify import twin as twins
from autodeploy.zoo.measure import tiny_model


@contextlib.contextmanager
def rounding_by_length(model):
    """Products round otherwise for other numbers of rows, as kernels chosen by shape do."""

    def hook(module, args, output):
        if torch.compiler.is_exporting():
            return None
        generator = torch.Generator().manual_seed(output.numel() // output.shape[-1])
        noise = torch.randn(output.shape, generator=generator)
        return output * (1 + noise * torch.finfo(output.dtype).eps / 2).to(output.dtype)

    products = [m for m in model.modules() if isinstance(m, nn.Linear)]
    handles = [product.register_forward_hook(hook) for product in products]
    yield model
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="module")
def chaotic():
    """Wide random projections in a deep stack of recurrences: each layer amplifies the last."""
    config = Mamba2Config(
        hidden_size=64, num_hidden_layers=24, state_size=16, num_heads=8, head_dim=16, n_groups=1,
        vocab_size=256, chunk_size=8, initializer_range=0.8,
    )  # fmt: skip
    torch.manual_seed(0)
    with rounding_by_length(Mamba2ForCausalLM(config).bfloat16().eval()) as model:
        yield model


def test_a_model_that_amplifies_rounding_is_causal_all_the_same(chaotic):
    reference = reference_logits(chaotic)
    assert not reference.tells
    assert reference.noise > 0.2


def test_it_is_proved_in_float32_and_served_packed_and_cached(chaotic, monkeypatch):
    said = []
    monkeypatch.setattr(ladder._log, "warning", lambda text, *args: said.append(text % args))
    built = build_runner(chaotic, load_recipe("default"))
    assert (built.rung, built.cause) == (1, "")
    assert built.program.contract.dtype is torch.bfloat16
    assert "Mamba2ForCausalLM amplifies rounding" in said[0]


def test_the_float32_stand_in_refuses_what_is_wrong(monkeypatch):
    monkeypatch.setattr(Reference, "tells", False)

    def refuse(self, program):
        raise CaptureError(f"wrong in {program.contract.dtype}")

    monkeypatch.setattr(SequenceCheck, "prove", refuse)
    built = build_runner(tiny_model(CONFIG_MAPPING["llama"]()).bfloat16(), load_recipe("default"))
    assert built.rung == 2
    assert "wrong in torch.float32" in built.cause


def test_without_a_twin_the_model_itself_is_proved_in_float32(monkeypatch):
    def refuse(model):
        raise twins.VerificationError("no list of layers")

    monkeypatch.setattr(twins, "twin_of", refuse)
    model = tiny_model(CONFIG_MAPPING["llama"]()).bfloat16()
    exact = twins.stand_in(model)
    assert exact.dtype is torch.float32
    assert model.dtype is torch.bfloat16
    assert torch.equal(exact.lm_head.weight, model.lm_head.weight.float())


@pytest.mark.parametrize("name", ["roformer", "xlnet"])
def test_encoders_are_told_apart_in_low_precision_too(name):
    with pytest.raises(NotCausalError):
        reference_logits(tiny_model(CONFIG_MAPPING[name]()).bfloat16())


@pytest.mark.parametrize("name", ["llama", "mixtral", "mamba2"])
def test_a_tame_model_tells_mistakes_from_rounding(name):
    reference = reference_logits(tiny_model(CONFIG_MAPPING[name]()).bfloat16())
    assert reference.tells
    assert 0 < reference.noise < 0.03
