"""What a checkpoint says about generating holds for those who say nothing."""

import json
import logging

import pytest

from autodeploy import SamplingParams, deploy
from autodeploy.errors import CheckpointError
from autodeploy.generation_defaults import defaults_of


@pytest.fixture
def stated(model):
    """The model's generation_config, put back afterwards."""
    before = dict(model.generation_config.__dict__)
    yield model.generation_config
    model.generation_config.__dict__.clear()
    model.generation_config.__dict__.update(before)


def checkpoint(folder, generation=None, **config):
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(generation)
    return folder


def lines(caplog, start):
    found = [r.getMessage() for r in caplog.records if r.name == "autodeploy"]
    return [line for line in found if line.startswith(start)]


def test_without_params_the_checkpoint_decides_and_says_so_once(model, stated, caplog):
    stated.temperature, stated.top_k, stated.max_new_tokens = 0.5, 7, 3
    with caplog.at_level(logging.INFO, "autodeploy"), deploy(model) as other:
        params = other.get_default_sampling_params()
        assert (params.temperature, params.top_k, params.max_tokens) == (0.5, 7, 3)
        for _ in range(2):
            assert len(other.generate([5, 6])[0].outputs[0].token_ids) <= 3
        own = other.generate([5, 6], SamplingParams(max_tokens=5, ignore_eos=True))
        assert len(own[0].outputs[0].token_ids) == 5
    (line,) = lines(caplog, "sampling defaults")
    assert "temperature=0.5, top_k=7, max_tokens=3; end of sequence: (1,)" in line


def test_else_they_are_those_of_vllm(llm):
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.max_tokens, params.top_p) == (1.0, 16, 1.0)


def test_a_file_states_what_a_live_model_does(tmp_path):
    generation = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": [7]}
    defaults = defaults_of(checkpoint(tmp_path, json.dumps(generation), eos_token_id=3), None)
    assert defaults.eos_token_ids == (7,)
    params = defaults.params()
    assert (params.temperature, params.top_p, params.repetition_penalty) == (0.6, 0.9, 1.1)


def test_do_sample_false_is_greedy(tmp_path):
    folder = checkpoint(tmp_path, '{"do_sample": false}')
    assert defaults_of(folder, None).params().greedy


def test_the_end_of_sequence_is_that_of_the_first_who_names_one(tmp_path, tokenizer):
    assert defaults_of(checkpoint(tmp_path, eos_token_id=[3, 4]), tokenizer).eos_token_ids == (3, 4)
    folder = checkpoint(tmp_path)
    assert defaults_of(folder, tokenizer).eos_token_ids == (tokenizer.eos_token_id,)
    assert defaults_of(folder, None).eos_token_ids == ()


def test_every_end_of_sequence_id_ends_a_sequence(llm, model, stated):
    greedy = SamplingParams(temperature=0, max_tokens=6)
    free = llm.generate([5, 6, 7], greedy.clone(ignore_eos=True))[0].outputs[0].token_ids
    stated.eos_token_id = [299, free[2]]
    with deploy(model) as other:
        (output,) = other.generate([5, 6, 7], greedy)[0].outputs
        assert output.token_ids == free[: free.index(free[2]) + 1]
        assert (output.finish_reason, output.stop_reason) == ("stop", None)
        ignoring = other.generate([5, 6, 7], greedy.clone(ignore_eos=True))[0].outputs[0]
        assert ignoring.token_ids == free
        patient = other.generate([5, 6, 7], greedy.clone(min_tokens=6))[0].outputs[0]
        assert len(patient.token_ids) == 6


def test_a_default_that_no_request_can_have_is_left_out_and_named(tmp_path, caplog):
    folder = checkpoint(tmp_path, '{"min_p": 3.0, "top_p": 0.5, "max_new_tokens": 0}')
    params = defaults_of(folder, None).params()
    assert (params.min_p, params.top_p, params.max_tokens) == (0.0, 0.5, 16)
    left_out = lines(caplog, "a default of the generation_config is left out")
    assert len(left_out) == 2
    assert "min_p=3.0" in left_out[0]


@pytest.mark.parametrize("generation", ["{", "[1]", '{"eos_token_id": "end"}'])
def test_a_file_that_makes_no_sense_is_named(tmp_path, generation):
    with pytest.raises(CheckpointError, match="generation_config.json|eos_token_id"):
        defaults_of(checkpoint(tmp_path, generation), None)
