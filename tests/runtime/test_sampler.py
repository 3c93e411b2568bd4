"""The sampler draws from the distribution that Hugging Face's processors define, row by row."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from autodeploy.errors import SamplingParamsError, UnknownTokenError
from autodeploy.runtime.messages import EngineRequest
from autodeploy.runtime.sampler import Sampler, draw
from autodeploy.runtime.sampling_params import SamplingParams
from autodeploy.runtime.truncation import truncate

VOCAB = 97
EOS = 5


def request(prompt=(1, 2, 3), seed=0, eos=(EOS,), **params) -> EngineRequest:
    return EngineRequest(
        request_id="r",
        prompt_token_ids=list(prompt),
        params=SamplingParams(**params),
        eos_token_ids=list(eos),
        seed=seed,
    )


def sampler_with(*requests: EngineRequest, vocab: int = VOCAB) -> Sampler:
    sampler = Sampler(vocab, len(requests))
    for row, entry in enumerate(requests):
        sampler.add(row, entry)
    return sampler


def random_logits(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def expected_scores(
    logits: torch.Tensor, prompt: list[int], output: list[int], params: SamplingParams
) -> torch.Tensor:
    """What Hugging Face's chain makes of one row [V]; two penalties it lacks are written out."""
    ids = torch.tensor([prompt + output])
    scores = logits[None].clone()
    if params.repetition_penalty != 1.0:
        scores = hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    counts = torch.bincount(torch.tensor(output, dtype=torch.long), minlength=len(logits))
    scores = scores - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    chain = hf.LogitsProcessorList()
    if params.logit_bias:
        chain.append(
            hf.SequenceBiasLogitsProcessor({(t,): b for t, b in params.logit_bias.items()})
        )
    if params.allowed_token_ids:
        others = sorted(set(range(len(logits))) - set(params.allowed_token_ids))
        chain.append(hf.SuppressTokensLogitsProcessor(others))
    if params.bad_words_token_ids:
        chain.append(hf.NoBadWordsLogitsProcessor(params.bad_words_token_ids))
    if params.min_tokens:
        ends = [EOS, *(params.stop_token_ids or [])]
        chain.append(hf.MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, ends))
    if not params.greedy:
        chain.append(hf.TemperatureLogitsWarper(params.temperature))
        if params.top_k:
            chain.append(hf.TopKLogitsWarper(params.top_k))
        if params.top_p < 1.0:
            chain.append(hf.TopPLogitsWarper(params.top_p))
        if params.min_p:
            chain.append(hf.MinPLogitsWarper(params.min_p))
    return chain(ids, scores)[0]


def random_params(pick: random.Random) -> SamplingParams:
    def maybe(value, otherwise):
        return value if pick.random() < 0.5 else otherwise

    some_ids = pick.sample(range(VOCAB), 12)
    return SamplingParams(
        temperature=pick.choice([0.3, 0.7, 1.0, 1.7]),
        top_k=maybe(pick.choice([1, 3, 10, 40, 500]), 0),
        top_p=maybe(pick.choice([0.05, 0.4, 0.9, 0.99]), 1.0),
        min_p=maybe(pick.choice([0.01, 0.2, 1.0]), 0.0),
        repetition_penalty=maybe(pick.choice([0.8, 1.3, 2.0]), 1.0),
        presence_penalty=maybe(pick.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(pick.uniform(-2, 2), 0.0),
        logit_bias=maybe({t: pick.uniform(-5, 5) for t in some_ids[:4]}, None),
        allowed_token_ids=maybe(pick.sample(range(20, VOCAB), 30), None),
        bad_words_token_ids=maybe([[3], [7, 4], [8, 9, 10], [9, 11], [6, 8, 9, 12]], None),
        stop_token_ids=maybe([17, 18], None),
        min_tokens=maybe(pick.choice([2, 6, 9]), 0),
    )


@pytest.mark.parametrize("rounded", [False, True], ids=["float32", "many ties"])
def test_the_distribution_equals_hugging_faces_for_random_mixtures(rounded):
    pick = random.Random(5)
    prompts = [[pick.randrange(VOCAB) for _ in range(pick.randint(4, 9))] for _ in range(150)]
    every = [random_params(pick) for _ in prompts]
    sampler = Sampler(VOCAB, 4)
    outputs = []
    for row, (prompt, params) in enumerate(zip(prompts, every, strict=True)):
        entry = request(prompt)
        entry.params = params
        sampler.add(row, entry)
        output = [pick.randrange(VOCAB) for _ in range(pick.choice([0, 1, 5, 8]))]
        output += pick.choice([[], [7], [6, 8, 9], [8, 9], [9]])
        for token_id in output:
            sampler.append(row, token_id)
        outputs.append(output)
    logits = random_logits(len(prompts), VOCAB)
    if rounded:
        logits = logits.to(torch.bfloat16).mul(2).round().div(2)
    found = sampler.distribution(logits, range(len(prompts)))
    for row, params in enumerate(every):
        scores = expected_scores(logits[row].float(), prompts[row], outputs[row], params)
        wanted, ours = scores.softmax(-1), found[row]
        if rounded:
            # Of equals at the edge of the nucleus theirs keeps an arbitrary part, of our size.
            wanted, ours = wanted.sort().values, ours.sort().values
        assert ((ours > 0) == (wanted > 0)).all(), params
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("vocab", [3, 255, 256, 257, 1000, 40_000])
@pytest.mark.parametrize("scale", [0.01, 2.0, 12.0])
def test_truncation_equals_hugging_faces_at_any_width(vocab, scale):
    logits = random_logits(6, vocab, scale=scale)
    weights = logits.softmax(-1)
    top_k = np.array([0, 7, 0, 300, vocab, 1])
    top_p = np.array([0.9, 0.6, 0.999, 0.95, 0.3, 1.0])
    min_p = np.array([0.0, 0.0, 0.1, 0.0, 0.02, 0.0])
    found = truncate(weights.clone(), top_k, top_p, min_p)
    for row in range(6):
        scores = logits[row : row + 1]
        if top_k[row]:
            scores = hf.TopKLogitsWarper(int(top_k[row]))(None, scores)
        if top_p[row] < 1:
            scores = hf.TopPLogitsWarper(float(top_p[row]))(None, scores)
        if min_p[row]:
            scores = hf.MinPLogitsWarper(float(min_p[row]))(None, scores)
        differing = (found[row] > 0) != scores[0].isfinite()
        # Theirs adds 40,000 float32 numbers in a row: the edge may move by that error.
        assert weights[row][differing].sum() < 2e-5
        assert differing.sum() <= max(1, vocab // 10_000 * 20)
        assert (found[row][found[row] > 0] == weights[row][found[row] > 0]).all()


def test_of_equals_at_the_edge_of_the_nucleus_the_first_stay():
    weights = torch.tensor([[0.1, 0.2, 0.1, 0.2, 0.1, 0.1, 0.2]])
    for top_p, kept in ((0.1, [1]), (0.35, [1, 3]), (0.75, [0, 1, 2, 3, 6])):
        found = truncate(weights.clone(), np.array([0]), np.array([top_p]), np.zeros(1))
        assert found[0].nonzero()[:, 0].tolist() == kept


def test_samples_follow_hugging_faces_distribution():
    mixtures = [
        {},
        {"temperature": 0.6, "top_k": 12},
        {"temperature": 1.5, "top_p": 0.8},
        {"min_p": 0.05},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.5},
        {"frequency_penalty": 1.0, "presence_penalty": 0.5, "logit_bias": {9: 4.0}},
    ]
    draws = 12_000
    for case, values in enumerate(mixtures):
        logits = random_logits(VOCAB, seed=case, scale=1.5)
        sampler = sampler_with(*[request(seed=seed, **values) for seed in range(draws)])
        tokens = sampler.sample(logits.expand(draws, -1), range(draws)).token_ids
        wanted = expected_scores(logits, [1, 2, 3], [], SamplingParams(**values)).softmax(-1)
        assert_follows(np.bincount(tokens, minlength=VOCAB), wanted)


def test_the_successive_tokens_of_one_request_follow_the_distribution_too():
    logits = random_logits(1, VOCAB, scale=1.0)
    sampler = sampler_with(request(seed=77, top_p=0.9))
    counts = np.zeros(VOCAB, dtype=int)
    for _ in range(3000):
        token_id = sampler.sample(logits, [0]).token_ids[0]
        sampler.append(0, token_id)
        counts[token_id] += 1
    wanted = expected_scores(logits[0], [1], [], SamplingParams(top_p=0.9)).softmax(-1)
    assert_follows(counts, wanted)


def assert_follows(counts: np.ndarray, distribution: torch.Tensor) -> None:
    wanted = distribution.double().numpy()
    assert (counts[wanted == 0] == 0).all()
    assert chi_square_probability(counts, wanted * counts.sum()) > 1e-4


def chi_square_probability(counts: np.ndarray, expected: np.ndarray) -> float:
    """Of a worse fit by chance; bins expected to hold less than 5 are put together."""
    small = expected < 5
    counts = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], max(expected[small].sum(), 1e-9))
    if expected[-1] < 5:
        counts, expected = counts[:-1], expected[:-1]
    statistic = ((counts - expected) ** 2 / expected).sum()
    half = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, torch.tensor(statistic / 2)))


MIXED = [
    {},
    {"temperature": 0.5},
    {"temperature": 0},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1, "temperature": 1.3},
    {"top_k": 50, "top_p": 0.95},
    {"repetition_penalty": 1.4},
    {"logit_bias": {4: 5.0}, "logprobs": 2},
    {"temperature": 0, "presence_penalty": 1.0},
]


@pytest.mark.parametrize("vocab", [VOCAB, 5003])
def test_the_same_seed_gives_the_same_tokens_in_any_batch(vocab):
    entries = [request(seed=1000 + i, **values) for i, values in enumerate(MIXED * 3)]
    together = sampler_with(*entries, vocab=vocab)
    alone = [sampler_with(entry, vocab=vocab) for entry in entries]
    order = np.random.default_rng(0)
    for step in range(12):
        logits = random_logits(len(entries), vocab, seed=step, scale=1.0)
        rows = order.permutation(len(entries))[: order.integers(1, len(entries) + 1)]
        drawn = together.sample(logits[rows], rows).token_ids
        for row, token_id in zip(rows.tolist(), drawn.tolist(), strict=True):
            by_itself = alone[row].sample(logits[row : row + 1], [0]).token_ids[0]
            assert token_id == by_itself
            together.append(row, token_id)
            alone[row].append(0, token_id)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_sampled_as_their_float32_values(dtype):
    logits = random_logits(len(MIXED), VOCAB, scale=1.0).to(dtype)
    sampler = sampler_with(*[request(seed=i, **values) for i, values in enumerate(MIXED)])
    rows = range(len(MIXED))
    half, single = sampler.sample(logits, rows), sampler.sample(logits.float(), rows)
    assert half.token_ids.tolist() == single.token_ids.tolist()
    assert half.logprobs == single.logprobs
    assert torch.equal(
        sampler.distribution(logits, rows), sampler.distribution(logits.float(), rows)
    )


def test_logits_need_not_be_contiguous():
    logits = random_logits(VOCAB, len(MIXED), scale=1.0).T
    sampler = sampler_with(*[request(seed=i, **values) for i, values in enumerate(MIXED)])
    found = sampler.sample(logits, range(len(MIXED)))
    wanted = sampler.sample(logits.contiguous(), range(len(MIXED)))
    assert found.token_ids.tolist() == wanted.token_ids.tolist()


def test_a_row_reused_after_removal_starts_afresh():
    entry = request(seed=9, repetition_penalty=1.3)
    sampler = sampler_with(entry)
    logits = random_logits(1, VOCAB, scale=1.0)
    first = sampler.sample(logits, [0]).token_ids[0]
    for token_id in (4, 5, 6):
        sampler.append(0, token_id)
    sampler.remove(0)
    sampler.add(0, entry)
    assert sampler.sample(logits, [0]).token_ids[0] == first


def test_sampling_does_not_advance_or_change_anything():
    sampler = sampler_with(request(repetition_penalty=2.0, top_k=3))
    logits = random_logits(1, VOCAB)
    before = logits.clone()
    tokens = {int(sampler.sample(logits, [0]).token_ids[0]) for _ in range(3)}
    assert len(tokens) == 1
    assert torch.equal(logits, before)


def test_the_table_grows_past_the_rows_expected():
    sampler = Sampler(VOCAB, 1)
    logits = random_logits(3, VOCAB)
    for row in (0, 40, 7):
        sampler.add(row, request(temperature=0))
    assert (sampler.sample(logits, [40, 0, 7]).token_ids == logits.argmax(-1).numpy()).all()


def test_rows_are_taken_once_and_must_be_live():
    sampler = sampler_with(request())
    with pytest.raises(ValueError, match="row 0"):
        sampler.add(0, request())
    for row in (-1, 3):
        with pytest.raises(ValueError, match="no live request"):
            sampler.append(row, 1)
        with pytest.raises(ValueError, match="no live request"):
            sampler.sample(random_logits(1, VOCAB), [row])
    sampler.remove(0)
    with pytest.raises(ValueError, match="no live request"):
        sampler.remove(0)
    with pytest.raises(ValueError, match="expected"):
        sampler.sample(random_logits(1, VOCAB + 1), [0])
    assert len(sampler.sample(torch.empty(0, VOCAB), []).token_ids) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_first_of_equals(dtype):
    logits = torch.zeros(3, VOCAB, dtype=dtype)
    logits[1, [30, 20, 90]] = 2.0
    logits[2, VOCAB - 1] = 1.0
    result = sampler_with(*[request(temperature=0)] * 3).sample(logits, [0, 1, 2])
    assert result.token_ids.tolist() == [0, 20, VOCAB - 1]
    assert result.token_ids.dtype == np.int64


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy_and_a_huge_one_uniform(temperature):
    logits = random_logits(4, VOCAB)
    cold = sampler_with(*[request(seed=i, temperature=temperature) for i in range(4)])
    assert (cold.sample(logits, range(4)).token_ids == logits.argmax(-1).numpy()).all()
    hot = sampler_with(request(temperature=1e300)).distribution(logits[:1], [0])
    torch.testing.assert_close(hot, torch.full((1, VOCAB), 1 / VOCAB))


def test_top_k_of_one_is_greedy_at_any_seed():
    logits = random_logits(200, VOCAB, scale=0.1)
    sampler = sampler_with(*[request(seed=i, top_k=1) for i in range(200)])
    assert (sampler.sample(logits, range(200)).token_ids == logits.argmax(-1).numpy()).all()


def test_penalties_count_every_append():
    params = {"frequency_penalty": 0.25, "presence_penalty": 0.5, "repetition_penalty": 1.25}
    sampler = sampler_with(request(prompt=[1, 1, 2], **params))
    pick = random.Random(0)
    output = [pick.randrange(VOCAB) for _ in range(700)] + [96] * 50
    for token_id in output:
        sampler.append(0, token_id)
    logits = random_logits(1, VOCAB, scale=8.0)
    wanted = expected_scores(logits[0], [1, 1, 2], output, SamplingParams(**params)).softmax(-1)
    torch.testing.assert_close(sampler.distribution(logits, [0])[0], wanted)


def test_presence_and_frequency_spare_the_prompt():
    logits = random_logits(1, VOCAB)
    sampler = sampler_with(request([1, 2, 3], presence_penalty=2.0, frequency_penalty=2.0))
    torch.testing.assert_close(sampler.distribution(logits, [0]), logits.softmax(-1))


def test_end_tokens_wait_for_min_tokens():
    logits = torch.zeros(1, VOCAB)
    logits[0, [EOS, 40]] = 9.0
    logits[0, 50] = 5.0
    entry = request(temperature=0, min_tokens=3, stop_token_ids=[40, 10**6])
    sampler = sampler_with(entry)
    seen = []
    for _ in range(5):
        seen.append(int(sampler.sample(logits, [0]).token_ids[0]))
        sampler.append(0, seen[-1])
    assert seen == [50, 50, 50, EOS, EOS]


def test_a_bad_word_is_forbidden_once_its_beginning_is_there():
    logits = torch.zeros(1, VOCAB)
    logits[0, 12] = 5.0
    logits[0, 30] = 4.0
    logits[0, 31] = 9.0
    words = [[31], [10, 11, 12], [2, 3, 12]]
    sampler = sampler_with(request([1, 2, 3], temperature=0, bad_words_token_ids=words))
    tokens = []
    for forced in (10, 11, 12, 10, 11):
        tokens.append(int(sampler.sample(logits, [0]).token_ids[0]))
        sampler.append(0, forced)
    tokens.append(int(sampler.sample(logits, [0]).token_ids[0]))
    assert tokens == [30, 12, 30, 12, 12, 30]


def test_bad_words_without_token_ids_are_refused():
    with pytest.raises(SamplingParamsError, match="bad_words_token_ids"):
        Sampler(VOCAB, 1).add(0, request(bad_words=["x"]))


def test_bias_and_allowed_tokens_steer_only_their_row():
    logits = torch.zeros(3, VOCAB)
    logits[:, 8] = 3.0
    sampler = sampler_with(
        request(temperature=0, logit_bias={60: 3.5}),
        request(temperature=0, allowed_token_ids=[70, 71, 70]),
        request(temperature=0),
    )
    assert sampler.sample(logits, [0, 1, 2]).token_ids.tolist() == [60, 70, 8]
    assert sampler.distribution(logits, [0, 1, 2])[[0, 1, 2], [60, 70, 8]].tolist() == [1.0] * 3


@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": {VOCAB: 1.0}},
        {"allowed_token_ids": [VOCAB]},
        {"bad_words_token_ids": [[1, VOCAB]]},
        {"repetition_penalty": 1.1},
    ],
)
def test_a_token_outside_the_vocabulary_is_refused_and_the_row_stays_free(params):
    sampler = Sampler(VOCAB, 1)
    with pytest.raises(UnknownTokenError, match=str(VOCAB)):
        sampler.add(0, request([1, VOCAB], **params))
    sampler.add(0, request())


@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_p": 0.9}, {"top_k": 4}])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_poisoned_row_is_reported_and_the_others_are_not_touched(params, poison):
    entries = [request(seed=i, logprobs=1, **params) for i in range(6)]
    sampler = sampler_with(*entries)
    logits = random_logits(6, VOCAB)
    clean = sampler.sample(logits, range(6))
    logits[2] = poison
    logits[4, 7] = math.nan
    result = sampler.sample(logits, range(6))
    assert result.bad_rows == [2, 4]
    assert result.token_ids[[2, 4]].tolist() == [-1, -1]
    assert all("model's logits" in result.reasons[row] for row in (2, 4))
    for row in (0, 1, 3, 5):
        assert result.token_ids[row] == clean.token_ids[row]
        assert result.logprobs[row] == clean.logprobs[row]
    assert result.logprobs[2] is None


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_row_whose_rules_forbid_everything_is_bad_with_a_reason(temperature):
    closed = request(temperature=temperature, allowed_token_ids=[EOS], min_tokens=2)
    sampler = sampler_with(request(), closed)
    result = sampler.sample(random_logits(2, VOCAB), [1, 0])
    assert result.bad_rows == [1]
    assert result.token_ids[0] == -1
    assert result.token_ids[1] >= 0
    assert "allowed_token_ids" in result.reasons[1]


def test_a_padded_vocabulary_of_minus_infinity_is_never_sampled():
    logits = random_logits(500, VOCAB, scale=0.1)
    logits[:, 90:] = -math.inf
    sampler = sampler_with(*[request(seed=i, top_p=0.99) for i in range(500)])
    result = sampler.sample(logits, range(500))
    assert result.bad_rows == []
    assert result.token_ids.max() < 90


def test_logprobs_are_the_models_own_with_ranks():
    logits = random_logits(4, VOCAB)
    entries = [
        request(temperature=0, logprobs=0, logit_bias={0: 100.0}),
        request(seed=1, logprobs=3, temperature=2.0, top_k=50),
        request(),
        request(temperature=0, logprobs=10**6),
    ]
    result = sampler_with(*entries).sample(logits, range(4))
    raw = logits.log_softmax(-1)
    assert result.logprobs[2] is None
    assert [len(result.logprobs[row]) for row in (0, 1, 3)] == [1, 4, 1 + VOCAB]
    for row in (0, 1, 3):
        first, *top = result.logprobs[row]
        assert first.token_id == result.token_ids[row]
        assert first.rank == 1 + int((raw[row] > raw[row, first.token_id]).sum())
        assert [entry.rank for entry in top] == list(range(1, len(top) + 1))
        best = raw[row].topk(len(top))
        assert [entry.token_id for entry in top] == best.indices.tolist()
        for entry in (first, *top):
            assert entry.logprob == pytest.approx(float(raw[row, entry.token_id]), abs=1e-6)


def test_equally_likely_tokens_share_a_rank():
    logits = torch.zeros(1, 6)
    logits[0, 3] = 1.0
    logits[0, 5] = -1.0
    sampler = Sampler(6, 1)
    (entries,) = sampler.prompt_logprobs(logits, [5], 6)
    assert entries[0].rank == 6
    assert [entry.rank for entry in entries[1:]] == [1, 2, 2, 2, 2, 6]


def test_prompt_logprobs_give_the_next_token_first():
    logits = random_logits(9000, VOCAB)
    following = [(7 * i) % VOCAB for i in range(9000)]
    sampler = Sampler(VOCAB, 1)
    entries = sampler.prompt_logprobs(logits.to(torch.bfloat16), following, 2)
    raw = logits.to(torch.bfloat16).float().log_softmax(-1)
    assert [row[0].token_id for row in entries] == following
    assert {len(row) for row in entries} == {3}
    found = torch.tensor([row[0].logprob for row in entries])
    torch.testing.assert_close(found, raw[torch.arange(9000), torch.tensor(following)])
    assert all(row[1].rank == 1 for row in entries)
    assert [len(row) for row in sampler.prompt_logprobs(logits[:2], following[:2], 0)] == [1, 1]
    assert sampler.prompt_logprobs(logits[:0], [], 3) == []


def test_the_inverse_never_lands_on_a_token_of_weight_zero():
    weights = torch.zeros(4, 1000)
    weights[0, [0, 999]] = 1.0
    weights[1, 300:310] = torch.tensor([0.0, 1e-30] * 5)
    weights[2, 999] = 1e-38
    weights[3, ::7] = torch.rand(143)
    for number in (0.0, 1e-12, 0.3, 0.5, 1 - 2**-53):
        chosen = draw(weights, np.full(4, number))
        assert (weights[torch.arange(4), chosen] > 0).all()
    assert draw(torch.zeros(1, 10), np.array([0.5])).tolist() == [-1]


def test_every_token_can_be_drawn_in_order():
    weights = torch.ones(1000, 1000)
    numbers = (np.arange(1000) + 0.5) / 1000
    assert draw(weights, numbers).tolist() == list(range(1000))
