"""What a request may say, and what exactly its outputs hold."""

import numpy as np
import pytest
import torch

from autodeploy import BeamSearchParams, SamplingParams, deploy
from autodeploy.detokenizer import Detokenizer
from autodeploy.errors import (
    ConfigError,
    InvalidRequestError,
    SamplingParamsError,
    UnknownTokenError,
)

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def tokens(outputs):
    return [o.outputs[0].token_ids for o in outputs]


def test_arrays_of_token_ids_are_prompts(llm):
    expected = tokens(llm.generate([[5, 6, 7]], GREEDY))
    for prompt in (np.array([5, 6, 7]), torch.tensor([5, 6, 7]), [np.int64(5), 6, 7], (5, 6, 7)):
        assert tokens(llm.generate(prompt, GREEDY)) == expected
    assert tokens(llm.generate(torch.tensor([[5, 6, 7], [5, 6, 7]]), GREEDY)) == expected * 2


@pytest.mark.parametrize("prompt", ["\ud800", [None], [[True, False]], [[5, 6.0]]], ids=repr)
def test_what_is_neither_text_nor_token_ids_is_refused_with_its_number(llm, prompt):
    with pytest.raises(InvalidRequestError, match="prompt 0 "):
        llm.generate(prompt, GREEDY)


@pytest.mark.parametrize(
    "change",
    [
        {"logit_bias": {300: 1.0}},
        {"allowed_token_ids": [5, 999]},
        {"bad_words_token_ids": [[5000]]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_params_that_name_unknown_tokens_submit_nothing(llm, change):
    before = llm._executor._engine.stats()
    with pytest.raises(UnknownTokenError, match="prompt 1: .* outside the vocabulary of 300"):
        llm.generate([[5], [6]], [GREEDY, GREEDY.clone(**change)])
    assert llm._executor._engine.stats() == before


def test_a_priority_for_each_prompt_must_be_one_for_each(llm):
    assert len(llm.generate([[5], [6]], GREEDY, priority=[1, 0])) == 2
    with pytest.raises(ConfigError, match="2 prompts"):
        llm.generate([[5], [6]], GREEDY, priority=[1])


def test_stop_strings_and_bad_words_without_a_tokenizer_are_refused(model):
    with deploy(model) as plain:
        with pytest.raises(SamplingParamsError, match="stop strings need a tokenizer"):
            plain.generate([5, 6], SamplingParams(stop=["x"]))
        with pytest.raises(SamplingParamsError, match="bad_words needs a tokenizer"):
            plain.generate([5, 6], SamplingParams(bad_words=["x"]))


def test_beam_search_takes_its_own_params(llm):
    assert llm.beam_search([[5]], BeamSearchParams(beam_width=2, max_tokens=1))
    with pytest.raises(ConfigError, match="BeamSearchParams, not SamplingParams"):
        llm.beam_search([[5]], GREEDY)


def test_a_stop_token_is_a_token_but_no_text(llm, tokenizer):
    plain = llm.generate("fox", GREEDY)[0].outputs[0]
    last = plain.token_ids[2]
    length = plain.token_ids.index(last) + 1
    params = GREEDY.clone(stop_token_ids=[last])
    silent = llm.generate("fox", params)[0].outputs[0]
    loud = llm.generate("fox", params.clone(include_stop_str_in_output=True))[0].outputs[0]
    assert silent.token_ids == loud.token_ids == plain.token_ids[:length]
    assert loud.text == tokenizer.decode(plain.token_ids[:length])
    assert silent.text == tokenizer.decode(plain.token_ids[: length - 1])


class Pieces:
    """A tokenizer whose tokens are given strings."""

    def __init__(self, pieces):
        self.pieces = pieces

    def decode(self, ids, **options):
        return "".join(self.pieces[i] for i in ids)


@pytest.mark.parametrize("stop", [["bcd", "c"], ["c", "bcd"], ["cd", "bcd"], ["d", "abc"]])
def test_the_stop_string_found_does_not_depend_on_how_text_is_cut_into_tokens(stop):
    found = set()
    for pieces in (["x", "abcd", "e"], ["xa", "bc", "de"], list("xabcde"), ["xabcde"]):
        text = Detokenizer(Pieces(pieces), [], stop=stop)
        text.append(range(len(pieces)))
        found.add((text.text, text.stop_reason))
    assert len(found) == 1


def test_skipped_tokens_and_broken_bytes_do_not_pile_up(tokenizer):
    word = tokenizer(" fox", add_special_tokens=False)["input_ids"]
    lonely = tokenizer.convert_tokens_to_ids("Ã")  # the first byte of a character, alone
    text = Detokenizer(tokenizer, [])
    for _ in range(300):
        text.append([tokenizer.eos_token_id])
    assert len(text._tokens) < 64
    text.append(word)
    assert text.text == " fox"
    for _ in range(300):
        text.append([lonely])
    assert len(text._tokens) - text._done < 64
    assert text.finish() == " fox" + "�" * 300
