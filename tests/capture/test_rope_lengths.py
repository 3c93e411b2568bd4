"""Frequencies that depend on the length are worked out per token, or the capture is refused."""

import copy
import dataclasses

import pytest
import torch
from rope_models import LONG, rope_model
from tiny_models import tiny_config, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from autodeploy.custom_ops.contract import LengthRule
from autodeploy.errors import CaptureError
from autodeploy.transforms.capture.attempts import _own_modules, capture_proved
from autodeploy.transforms.capture.export import capture
from autodeploy.transforms.capture.length_rule import length_rule
from autodeploy.transforms.capture.rope_lengths import length_rotaries
from autodeploy.transforms.pipeline import run_recipe
from autodeploy.transforms.recipe import load_recipe
from autodeploy.transforms.verify import SequenceCheck, reference_logits

LENGTHS = [(11, 6), (16, 17), (40, 9), (100, 20)]


@pytest.mark.parametrize(("name", "kind"), LONG)
def test_logits_are_exact_below_across_and_far_past_the_threshold(name, kind):
    model = rope_model(name, kind)
    checks = [SequenceCheck(reference_logits(model, lengths=pair)) for pair in LENGTHS]
    program = capture(model)
    packed = [check.error(program) for check in checks]
    run_recipe(program, load_recipe("default"))
    cached = [check.error(program) for check in checks]
    assert max(packed + cached) < 1e-4
    # The lengths matter: those of another prompt give other logits.
    program.contract = dataclasses.replace(program.contract, lengths=LengthRule())
    assert checks[2].error(program) > 1e-3


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_model_that_ran_before_gives_what_a_new_one_gives(kind):
    model, new = rope_model("llama", kind), rope_model("llama", kind)
    with torch.no_grad():
        model(input_ids=torch.arange(60)[None], use_cache=False)
    rotary = model.model.rotary_emb
    before = {**vars(rotary)}, {**rotary._buffers}
    check = SequenceCheck(reference_logits(new, lengths=(40, 20)))
    assert check.error(capture(model)) < 1e-4
    found = reference_logits(model, lengths=(40, 20))
    assert all(torch.equal(a, b) for a, b in zip(found.logits, check.reference.logits, strict=True))
    assert {**vars(rotary)}.keys() == before[0].keys()
    assert rotary.max_seq_len_cached == before[0]["max_seq_len_cached"]
    assert all(torch.equal(before[1][name], value) for name, value in rotary._buffers.items())


class OddRotary(LlamaRotaryEmbedding):
    """Its cosines grow past 50 tokens."""

    @dynamic_rope_update
    def forward(self, x, position_ids):
        cos, sin = LlamaRotaryEmbedding.forward.__wrapped__.__wrapped__(self, x, position_ids)
        return (cos * 1.5, sin) if int(position_ids.max()) > 50 else (cos, sin)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_dependence_that_nobody_knows_is_refused(kind):
    model = rope_model("llama", kind)
    model.model.rotary_emb = OddRotary(model.config)
    with pytest.raises(CaptureError, match=f"OddRotary rotates by the length .*'{kind}'"):
        # Nor may it run as it is, inside a packed graph that does not tell it the length.
        capture_proved(model, SequenceCheck(reference_logits(model)).prove)


def test_a_part_that_rotates_by_the_length_is_not_run_as_it_is():
    model = rope_model("llama", "dynamic")
    with pytest.raises(CaptureError, match="model.rotary_emb rotates by the length of the input"):
        _own_modules(model, ["model.rotary_emb"], keeps=False)


def test_a_threshold_below_the_sample_is_no_lack_of_causality():
    model = tiny_model(
        "llama", max_position_embeddings=8,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0},
    )  # fmt: skip
    check = SequenceCheck(reference_logits(model))
    assert check.error(capture(model)) < 1e-4


def test_when_a_model_drops_its_cache_is_found_by_asking_it():
    def rule(model):
        return length_rule(model, length_rotaries(model))

    assert rule(tiny_model("llama")) is None
    assert rule(rope_model("llama", "longrope")) == LengthRule(steps=(16,))
    assert rule(rope_model("llama", "dynamic")) == LengthRule(grows_past=16)
    assert rule(rope_model("phi3", "longrope")) == LengthRule(steps=(16,), recompute_past=16)
    forgetful = rope_model("llama", "longrope")
    forgetful.prepare_inputs_for_generation = lambda ids, **_: {"input_ids": ids}
    with pytest.raises(CaptureError, match="drops its cache after 16 tokens and after others"):
        capture(forgetful)


def test_a_dynamic_model_is_made_for_its_factor_times_the_trained_length():
    assert capture(rope_model("llama", "dynamic")).contract.max_positions == 128
    assert tiny_config("llama").max_position_embeddings == 256


def test_capture_does_not_change_the_model():
    model = rope_model("gemma3_text", "longrope")
    state = copy.deepcopy(dict(model.named_buffers()))
    names = set(vars(model.model.rotary_emb))
    capture(model)
    assert set(vars(model.model.rotary_emb)) == names
    after = dict(model.named_buffers())
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("rule", "length", "alike"),
    [
        (LengthRule(), 1000, 1),
        (LengthRule(steps=(16,)), 16, 1),
        (LengthRule(steps=(16,)), 17, 17),
        (LengthRule(steps=(16,)), 99, 17),
        (LengthRule(steps=(16, 32)), 99, 33),
        (LengthRule(grows_past=16), 16, 1),
        (LengthRule(grows_past=16), 99, 99),
        (LengthRule(steps=(8,), grows_past=16), 12, 9),
    ],
)
def test_alike_is_the_smallest_length_with_the_same_keys(rule, length, alike):
    assert rule.alike(length) == alike
    assert rule.alike(alike) == alike


def test_a_sequence_starts_again_only_where_it_crosses():
    rule = LengthRule(steps=(16,), recompute_past=16)
    assert [rule.prompt_tokens(10, known) for known in (10, 16, 17, 40)] == [10, 10, 17, 17]
    assert rule.prompt_tokens(17, 40) == 17
    assert LengthRule(steps=(16,)).prompt_tokens(10, 40) == 10


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_model_without_its_weights_is_captured_the_same(kind):
    model = rope_model("llama", kind)
    with FakeTensorMode(allow_non_fake_inputs=True):
        program = capture(AutoModelForCausalLM.from_config(copy.deepcopy(model.config)))
    program.source.originals = capture(model).source.originals
    assert SequenceCheck(reference_logits(model, lengths=(40, 20))).error(program) < 1e-4
