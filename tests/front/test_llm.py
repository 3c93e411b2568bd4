"""LLM: what users of vLLM and TensorRT-LLM expect of it."""

import logging

import pytest
import torch
from conftest import pages_used
from toy_tokenizers import byte_level

from autodeploy import LLM, BeamSearchParams, SamplingParams, deploy
from autodeploy.errors import (
    ConfigError,
    EmptyPromptError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    PromptTooLongError,
    RecipeError,
    SamplingParamsError,
    UnknownTokenError,
)

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def tokens(outputs):
    return [o.outputs[0].token_ids for o in outputs]


def greedy_continuation(model, prompt, count):
    ids = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=count, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return ids[0, len(prompt) :].tolist()


def test_outputs_come_in_the_order_of_prompts_and_carry_everything(llm, model, tokenizer):
    prompts = ["the quick brown", [5, 6, 7], {"prompt": "fox"}, {"prompt_token_ids": [9, 8]}]
    outputs = llm.generate(prompts, GREEDY)
    assert [o.prompt for o in outputs] == ["the quick brown", None, "fox", None]
    assert [o.prompt_token_ids for o in outputs][1::2] == [[5, 6, 7], [9, 8]]
    for output in outputs:
        completion = output.outputs[0]
        assert completion.token_ids == greedy_continuation(model, output.prompt_token_ids, 6)
        assert output.finished
        assert completion.finish_reason == "length"
        whole = tokenizer.decode(output.prompt_token_ids + completion.token_ids)
        assert whole.endswith(completion.text)
        metrics = output.metrics
        assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time
    assert len({o.request_id for o in outputs}) == 4


def test_a_single_prompt_of_any_form_is_a_list_of_one(llm):
    assert len(llm.generate("fox", GREEDY)) == 1
    assert len(llm.generate([4, 5, 6], GREEDY)) == 1
    assert llm.generate([], GREEDY) == []


def test_the_same_seed_gives_the_same_tokens_whatever_else_runs(llm):
    own = SamplingParams(seed=7, max_tokens=10, ignore_eos=True)
    alone = tokens(llm.generate("the lazy", own))
    others = SamplingParams(max_tokens=14, ignore_eos=True)
    together = llm.generate(["x", "the lazy", "fox"] * 3, [others, own, others] * 3)
    assert tokens(together)[1::3] == alone * 3
    assert tokens(together)[0] != tokens(together)[3]


def test_n_sequences_differ_and_the_first_is_that_of_one(llm):
    one = tokens(llm.generate("fox", SamplingParams(seed=3, max_tokens=8)))[0]
    (many,) = llm.generate("fox", SamplingParams(seed=3, max_tokens=8, n=3))
    assert [c.index for c in many.outputs] == [0, 1, 2]
    assert many.outputs[0].token_ids == one
    assert len({tuple(c.token_ids) for c in many.outputs}) == 3


def test_the_seed_of_the_llm_makes_unseeded_requests_repeatable(model):
    def run(seed):
        with deploy(model, seed=seed) as fresh:
            return tokens(fresh.generate([[5, 6]] * 2, SamplingParams(max_tokens=8)))

    assert run(1) == run(1) != run(2)


def test_a_stop_string_cuts_text_and_tokens(llm, tokenizer):
    plain = llm.generate("the quick", SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
    text = plain[0].outputs[0].text
    stop = text[5:8]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=[stop])
    completion = llm.generate("the quick", params)[0].outputs[0]
    assert completion.text == text[: text.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.token_ids == plain[0].outputs[0].token_ids[: len(completion.token_ids)]
    assert stop in tokenizer.decode(completion.token_ids)
    assert stop not in tokenizer.decode(completion.token_ids[:-1])
    included = params.clone(include_stop_str_in_output=True)
    assert llm.generate("the quick", included)[0].outputs[0].text.endswith(stop)
    assert pages_used(llm) == 0


def test_stop_tokens_and_eos_end_a_sequence_unless_ignored(llm, model):
    first = greedy_continuation(model, [5, 6, 7], 4)
    stop = SamplingParams(temperature=0, max_tokens=4, stop_token_ids=[first[2]], ignore_eos=True)
    completion = llm.generate([5, 6, 7], stop)[0].outputs[0]
    assert completion.token_ids == first[: first.index(first[2]) + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", first[2])
    late = stop.clone(min_tokens=4)
    assert len(llm.generate([5, 6, 7], late)[0].outputs[0].token_ids) == 4


def test_without_max_tokens_a_sequence_fills_the_context(model):
    with deploy(model, max_model_len=20) as short:
        params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        completion = short.generate([5, 6, 7], params)[0].outputs[0]
    assert len(completion.token_ids) == 17
    assert completion.finish_reason == "length"


def test_logprobs_are_those_of_the_model(llm, model):
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=4, logprobs=3, prompt_logprobs=2)
    (output,) = llm.generate([5, 6, 7, 8], params)
    completion = output.outputs[0]
    ids = torch.tensor([output.prompt_token_ids + completion.token_ids])
    with torch.no_grad():
        expected = model(ids).logits[0].log_softmax(-1)
    for step, (token, entry) in enumerate(
        zip(completion.token_ids, completion.logprobs, strict=True)
    ):
        row = expected[3 + step]
        assert set(row.topk(3).indices.tolist()) | {token} == set(entry)
        for candidate, logprob in entry.items():
            assert logprob.logprob == pytest.approx(float(row[candidate]), abs=1e-4)
            assert logprob.rank == int((row > row[candidate]).sum()) + 1
            assert isinstance(logprob.decoded_token, str)
    total = sum(
        e[t].logprob for t, e in zip(completion.token_ids, completion.logprobs, strict=True)
    )
    assert completion.cumulative_logprob == pytest.approx(total)
    assert output.prompt_logprobs[0] is None
    for position, entry in enumerate(output.prompt_logprobs[1:], 1):
        token = output.prompt_token_ids[position]
        assert entry[token].logprob == pytest.approx(float(expected[position - 1, token]), abs=1e-4)


def test_bad_words_and_allowed_tokens_hold(llm, model, tokenizer):
    first = greedy_continuation(model, tokenizer("fox")["input_ids"], 1)[0]
    word = tokenizer.decode([first])
    banned = SamplingParams(temperature=0, max_tokens=6, bad_words=[word], ignore_eos=True)
    assert first not in llm.generate("fox", banned)[0].outputs[0].token_ids
    allowed = SamplingParams(max_tokens=12, allowed_token_ids=[40, 50], ignore_eos=True)
    assert set(llm.generate("fox", allowed)[0].outputs[0].token_ids) <= {40, 50}


def test_a_shared_prefix_is_computed_once(llm):
    prompt = list(range(3, 3 + 40))
    llm.generate(prompt, GREEDY)
    again = llm.generate([[*prompt, 50]], GREEDY)[0]
    assert again.num_cached_tokens == 32
    salted = llm.generate([[*prompt, 50]], GREEDY, cache_salt="somebody else")[0]
    assert salted.num_cached_tokens == 0
    assert tokens([salted]) == tokens([again])


def test_chat_uses_the_template_of_the_tokenizer(llm, tokenizer):
    messages = [{"role": "user", "content": "the fox"}]
    (output,) = llm.chat(messages, GREEDY)
    assert output.prompt == "user: the fox\nassistant: "
    both = llm.chat([messages, messages[:1]], GREEDY)
    assert tokens(both) == tokens([output]) * 2
    with pytest.raises(InvalidRequestError, match="no such role"):
        llm.chat([{"role": "nobody", "content": ""}], GREEDY)
    with pytest.raises(InvalidRequestError, match="'role' and 'content'"):
        llm.chat([{"content": "x"}], GREEDY)


def test_beams_are_those_of_an_exhaustive_search(llm, model):
    prompt, width, steps = [5, 6, 7], 3, 4
    beams = [(0.0, prompt)]
    for _ in range(steps):
        grown = []
        for score, ids in beams:
            with torch.no_grad():
                row = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            grown += [(score + float(row[t]), [*ids, t]) for t in range(300)]
        beams = sorted(grown, reverse=True)[:width]
    params = BeamSearchParams(beam_width=width, max_tokens=steps, ignore_eos=True)
    found = llm.beam_search([prompt], params)[0].sequences
    assert [s.tokens for s in found] == [ids for _, ids in beams]
    for sequence, (score, _) in zip(found, beams, strict=True):
        assert sequence.cum_logprob == pytest.approx(score, abs=1e-4)
        assert sequence.text is not None


def test_a_beam_that_ends_is_kept_with_its_score(model, tokenizer):
    ending = greedy_continuation(model, [5, 6, 7], 2)[1]
    model.generation_config.eos_token_id = ending
    try:
        with deploy(model, tokenizer=tokenizer) as other:
            params = BeamSearchParams(beam_width=4, max_tokens=4, length_penalty=0.0)
            sequences = other.beam_search([[5, 6, 7]], params)[0].sequences
    finally:
        model.generation_config.eos_token_id = 1
    for sequence in sequences:
        ended = sequence.tokens[-1] == ending
        assert sequence.finish_reason == ("stop" if ended else "length")
        assert ending not in sequence.tokens[3:-1]
    assert any(s.finish_reason == "stop" for s in sequences)


class TestDefaults:
    def test_without_params_the_checkpoint_decides_and_says_so_once(self, model, caplog):
        changed = model.generation_config
        changed.temperature, changed.top_k, changed.max_new_tokens = 0.5, 7, 3
        try:
            with caplog.at_level(logging.INFO, "autodeploy"), deploy(model) as other:
                params = other.get_default_sampling_params()
                assert (params.temperature, params.top_k, params.max_tokens) == (0.5, 7, 3)
                assert len(other.generate([5, 6])[0].outputs[0].token_ids) <= 3
        finally:
            changed.temperature = changed.top_k = changed.max_new_tokens = None
        lines = [r.getMessage() for r in caplog.records if "sampling defaults" in r.getMessage()]
        assert len(lines) == 1
        assert "temperature=0.5, top_k=7, max_tokens=3" in lines[0]

    def test_else_they_are_those_of_vllm(self, llm):
        params = llm.get_default_sampling_params()
        assert (params.temperature, params.max_tokens, params.top_p) == (1.0, 16, 1.0)


class TestBadInput:
    """Each is refused by its own type with a sentence that says what to change."""

    @pytest.mark.parametrize(
        ("prompt", "error", "message"),
        [
            ([[]], EmptyPromptError, "prompt 0 has no tokens; give at least one"),
            ("", EmptyPromptError, "no tokens"),
            ([[3] * 300], PromptTooLongError, "300 tokens; sequences hold 256"),
            ([[3, 4], [3, 300]], UnknownTokenError, "prompt 1: token id 300 .* use 0 to 299"),
            ([[3, -1]], UnknownTokenError, "token id -1"),
            ([{"promt": "x"}], InvalidRequestError, "'prompt' or 'prompt_token_ids', not promt"),
            ([3.5], InvalidRequestError, "flat list of integers"),
            (7, InvalidRequestError, "not int"),
        ],
    )
    def test_prompts(self, llm, prompt, error, message):
        with pytest.raises(error, match=message):
            llm.generate(prompt, GREEDY)
        assert pages_used(llm) == 0

    @pytest.mark.parametrize(
        "values",
        [
            {"temperature": float("nan")}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.5},
            {"top_k": -2}, {"min_p": -1.0}, {"n": 0}, {"max_tokens": 0}, {"logprobs": -1},
            {"min_tokens": 9, "max_tokens": 3}, {"repetition_penalty": 0.0}, {"stop": [""]},
            {"n": 2, "temperature": 0.0}, {"allowed_token_ids": []},
        ],
        ids=str,
    )  # fmt: skip
    def test_sampling_values(self, values):
        with pytest.raises(SamplingParamsError):
            SamplingParams(**values)

    def test_an_unknown_field_is_refused(self):
        with pytest.raises(TypeError, match="temprature"):
            SamplingParams(temprature=1.0)

    def test_options_and_recipes_before_anything_is_loaded(self, model):
        with pytest.raises(ConfigError, match="no option 'max_model_length'.*'max_model_len'"):
            deploy(model, max_model_length=3)
        with pytest.raises(ConfigError, match="max_num_seqs must be a positive integer, not 0"):
            deploy("no/such/checkpoint", max_num_seqs=0)
        with pytest.raises(RecipeError, match="did you mean 'steps'"):
            deploy("no/such/checkpoint", recipe={"step": []})
        with pytest.raises(RecipeError, match="needs FUNCTIONAL"):
            deploy("no/such/checkpoint", recipe={"steps": ["canonicalize", "cache", "canonicalize"]}
                   | {"steps": ["canonicalize", "cache", "fuse_parallel_linears"]})  # fmt: skip

    def test_text_without_a_tokenizer_and_chat_without_a_template(self, model):
        with deploy(model) as plain, deploy(model, tokenizer=byte_level()) as untemplated:
            with pytest.raises(InvalidRequestError, match="pass tokenizer="):
                plain.generate("text")
            with pytest.raises(InvalidRequestError, match="no chat template"):
                untemplated.chat([{"role": "user", "content": "x"}])

    def test_one_bad_prompt_submits_none_and_a_list_of_params_must_match(self, llm):
        before = llm._executor._engine.stats().finished
        with pytest.raises(EmptyPromptError, match="prompt 2"):
            llm.generate([[3], [4], []], GREEDY)
        with pytest.raises(ConfigError, match="3 prompts, but 2 SamplingParams"):
            llm.generate([[3], [4], [5]], [GREEDY, GREEDY])
        assert llm._executor._engine.stats().finished == before


def test_a_request_with_nan_logits_fails_alone(model):
    poisoned = model.get_input_embeddings().weight
    kept = poisoned[77].detach().clone()
    with torch.no_grad():
        poisoned[77] = float("nan")
    try:
        with deploy(model) as other:
            outputs = other.generate([[5, 6], [5, 77], [8, 9]], GREEDY)
            assert [o.error is None for o in outputs] == [True, False, True]
            assert outputs[1].outputs[0].finish_reason == "error"
            assert len(outputs[0].outputs[0].token_ids) == 6
            with pytest.raises(EngineError, match="not numbers|NaN"):
                other.generate([5, 77], GREEDY)
            assert len(other.generate([5, 6], GREEDY)[0].outputs[0].token_ids) == 6
    finally:
        with torch.no_grad():
            poisoned[77] = kept


def test_ctrl_c_leaves_nothing_behind(llm, monkeypatch):
    plain = llm._executor.poll
    calls = []

    def interrupted(timeout):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(timeout)

    monkeypatch.setattr(llm._executor, "poll", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5, 6, 7], [8, 9]], SamplingParams(max_tokens=50, ignore_eos=True))
    monkeypatch.undo()
    assert pages_used(llm) == 0
    assert len(llm.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids) == 6


def test_shutdown_frees_and_says_so_afterwards(model):
    llm = deploy(model)
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(EngineDeadError, match="was shut down"):
        llm.generate([3, 4])


def test_llm_and_deploy_are_the_same_thing(model):
    with LLM(model) as one, deploy(model) as other:
        assert type(one) is type(other)
        assert tokens(one.generate([3, 4], GREEDY)) == tokens(other.generate([3, 4], GREEDY))
