"""LLM: what users of vLLM and TensorRT-LLM expect of it."""

import pytest
import torch
from held_pages import pages_used

from autodeploy import LLM, SamplingParams, deploy
from autodeploy.errors import (
    EngineDeadError,
    EngineError,
    InvalidRequestError,
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


@pytest.mark.parametrize(
    "own",
    [
        SamplingParams(seed=11, max_tokens=10, ignore_eos=True, temperature=1.5),
        SamplingParams(seed=11, max_tokens=10, ignore_eos=True, top_p=0.8, repetition_penalty=1.3),
        SamplingParams(seed=11, max_tokens=10, ignore_eos=True, top_k=20, n=3, logprobs=1),
    ],
    ids=["hot", "top p", "three"],
)
def test_a_request_alone_and_among_ten_others(llm, own):
    def sequences(output):
        return [c.token_ids for c in output.outputs]

    alone = sequences(llm.generate([5, 6, 7], own)[0])
    others = [SamplingParams(seed=i, max_tokens=3 + i, n=1 + i % 2) for i in range(10)]
    prompts = [[3 + i] * (1 + 3 * i) for i in range(10)]
    for place in (0, 4, 10):
        outputs = llm.generate(
            [*prompts[:place], [5, 6, 7], *prompts[place:]],
            [*others[:place], own, *others[place:]],
        )
        assert sequences(outputs[place]) == alone


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


@pytest.mark.parametrize("stop", ["größ", "日本", "🎉", "é", "e<", "x"])
def test_stop_strings_of_any_characters_over_any_tokens(llm, tokenizer, stop):
    text = "a café – größer 日本語 🎉!<x"
    forced = tokenizer(text, add_special_tokens=False)["input_ids"]
    at = text.find(stop)
    for include in (False, True):
        params = SamplingParams(
            temperature=0, max_tokens=len(forced), ignore_eos=True, stop=[stop],
            include_stop_str_in_output=include, logprobs=0,
        )  # fmt: skip
        made = follow(llm, forced, params)
        end = len(text) if at < 0 else at + (len(stop) if include else 0)
        assert made.text == text[:end]
        assert (made.finish_reason, made.stop_reason) == (
            ("length", None) if at < 0 else ("stop", stop)
        )
        if at >= 0:
            assert stop in tokenizer.decode(made.token_ids)
            assert stop not in tokenizer.decode(made.token_ids[:-1])
        assert len(made.logprobs) == len(made.token_ids)
    assert pages_used(llm) == 0


def follow(llm, forced, params):
    """The completion of a request whose tokens are given, as if the model had chosen them."""
    engine = llm._executor._engine
    rows, sample = {}, engine._sampler.sample
    add = engine._sampler.add

    def remember(row, request, matcher=None):
        rows[row] = 0
        add(row, request, matcher)

    def sample_forced(logits, index):
        for place, row in enumerate(index):
            logits[place] = 0.0
            logits[place, forced[rows[row]]] = 50.0
            rows[row] += 1
        return sample(logits, index)

    engine._sampler.add, engine._sampler.sample = remember, sample_forced
    try:
        return llm.generate([5, 6], params)[0].outputs[0]
    finally:
        del engine._sampler.add, engine._sampler.sample


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
    asked = llm.chat(
        messages, GREEDY, add_generation_prompt=False,
        chat_template="{{ greeting }} {{ messages[0].content }}",
        chat_template_kwargs={"greeting": "hello"},
    )  # fmt: skip
    assert asked[0].prompt == "hello the fox"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "nobody", "content": ""}], "no such role"),
        ([{"content": "x"}], "'role' and 'content'"),
        ([], "not empty"),
        ([[]], "not empty"),
        ([[{"role": "user", "content": "x"}], {"role": "user"}], "a conversation is a list"),
        ("hello", "a list of {'role', 'content'} dicts"),
        ([{"role": "user", "content": "\ud800"}], "the chat template refuses"),
    ],
    ids=range(7),
)
def test_messages_that_are_none(llm, messages, message):
    with pytest.raises(InvalidRequestError, match=message):
        llm.chat(messages, GREEDY)


def test_a_request_with_nan_logits_fails_alone(poisoned):
    outputs = poisoned.generate([[5, 6], [5, 77], [8, 9]], GREEDY)
    assert [o.error is None for o in outputs] == [True, False, True]
    assert outputs[1].outputs[0].finish_reason == "error"
    alone = [poisoned.generate(p, GREEDY)[0] for p in ([5, 6], [8, 9])]
    assert tokens(outputs[::2]) == tokens(alone)
    with pytest.raises(EngineError, match="NaN"):
        poisoned.generate([5, 77], GREEDY)
    assert pages_used(poisoned) == 0


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
