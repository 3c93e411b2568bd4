"""Beam search finds what a search over the model's own logits finds."""

import pytest
import torch
from held_pages import pages_used
from rope_models import generated, rope_model

from autodeploy import BeamSearchParams, SamplingParams, deploy
from autodeploy.errors import (
    ConfigError,
    EmptyPromptError,
    EngineError,
    PromptTooLongError,
    SamplingParamsError,
)

PROMPT = [5, 6, 7]


def reference(model, prompt, params, eos=frozenset()):
    """(score, tokens) of the best beams: each step tries every token of every live one."""
    live, ended = [(0.0, prompt)], []
    for _ in range(params.max_tokens):
        with torch.no_grad():
            rows = model(torch.tensor([ids for _, ids in live])).logits[:, -1].log_softmax(-1)
        grown = [
            (total + logprob, [*ids, token])
            for (total, ids), row in zip(live, rows.tolist(), strict=True)
            for token, logprob in enumerate(row)
        ]
        grown.sort(reverse=True)
        ended += [beam for beam in grown[: params.beam_width] if beam[1][-1] in eos]
        live = [beam for beam in grown if beam[1][-1] not in eos][: params.beam_width]
    scored = [
        (total / (len(ids) - len(prompt)) ** params.length_penalty, ids)
        for total, ids in ended + live
    ]
    return sorted(scored, reverse=True)[: params.beam_width]


def scores(sequences, params, prompt):
    return [
        s.cum_logprob / (len(s.tokens) - len(prompt)) ** params.length_penalty for s in sequences
    ]


@pytest.fixture(scope="module")
def ending(model, tokenizer):
    """An LLM whose end-of-sequence token is the likeliest second token after PROMPT."""
    ids = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=2, pad_token_id=0)
    eos, model.generation_config.eos_token_id = model.generation_config.eos_token_id, int(ids[0, 4])
    try:
        with deploy(model, tokenizer=tokenizer, max_model_len=64) as other:
            yield other
    finally:
        model.generation_config.eos_token_id = eos


@pytest.mark.parametrize("width", [1, 3])
def test_beams_are_those_of_an_exhaustive_search(llm, model, tokenizer, width):
    params = BeamSearchParams(beam_width=width, max_tokens=4, ignore_eos=True)
    prompts = [PROMPT, [9, 8]]
    for prompt, found in zip(prompts, llm.beam_search(prompts, params), strict=True):
        expected = reference(model, prompt, params)
        assert [s.tokens for s in found.sequences] == [ids for _, ids in expected]
        total = scores(found.sequences, params, prompt)
        assert total == pytest.approx([score for score, _ in expected], abs=1e-4)
        assert [s.text for s in found.sequences] == [tokenizer.decode(ids) for _, ids in expected]
        assert {s.finish_reason for s in found.sequences} == {"length"}
    assert pages_used(llm) == 0


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_beams_that_end_compete_by_their_score(ending, model, penalty):
    params = BeamSearchParams(beam_width=4, max_tokens=4, length_penalty=penalty)
    eos = ending.defaults.eos_token_ids
    sequences = ending.beam_search([PROMPT], params)[0].sequences
    expected = reference(model, PROMPT, params, set(eos))
    assert [s.tokens for s in sequences] == [ids for _, ids in expected]
    for sequence in sequences:
        ended = sequence.tokens[-1] in eos
        assert sequence.finish_reason == ("stop" if ended else "length")
    assert any(s.finish_reason == "stop" for s in sequences) or penalty > 1


def test_beams_end_where_the_context_does(ending):
    prompt = [*range(3, 64)]
    params = BeamSearchParams(beam_width=2, max_tokens=9, ignore_eos=True)
    sequences = ending.beam_search([prompt], params)[0].sequences
    assert [len(s.tokens) for s in sequences] == [64, 64]


def test_what_cannot_be_searched_is_refused(llm):
    for values in (
        {"beam_width": 0}, {"max_tokens": 0}, {"beam_width": True}, {"beam_width": 1.5},
        {"length_penalty": float("nan")}, {"length_penalty": "long"},
    ):  # fmt: skip
        with pytest.raises(SamplingParamsError, match=next(iter(values))):
            BeamSearchParams(**{"beam_width": 2, "max_tokens": 2, **values})
    params = BeamSearchParams(beam_width=2, max_tokens=2)
    with pytest.raises(ConfigError, match="BeamSearchParams, not SamplingParams"):
        llm.beam_search([PROMPT], SamplingParams())
    with pytest.raises(EmptyPromptError, match="prompt 1"):
        llm.beam_search([PROMPT, []], params)
    with pytest.raises(PromptTooLongError):
        llm.beam_search([[3] * 256], params)


def test_a_beam_that_fails_is_an_error_and_not_left_out(poisoned):
    params = BeamSearchParams(beam_width=2, max_tokens=2)
    with pytest.raises(EngineError, match="NaN"):
        poisoned.beam_search([[5, 6], [5, 77]], params)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_beams_past_the_trained_length_keep_the_keys_of_their_prompt(kind):
    own = rope_model("llama", kind)
    prompt = [(7 * i) % 250 + 3 for i in range(12)]
    params = BeamSearchParams(beam_width=1, max_tokens=24, ignore_eos=True)
    with deploy(own, max_model_len=64, block_size=4) as llm:
        (found,) = llm.beam_search([prompt], params)
    assert found.sequences[0].tokens[12:] == generated(own, prompt, 24)
