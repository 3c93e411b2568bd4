"""No request sees another's tokens: real caches, few pages, and aborts at every moment.

Whatever nobody owns is filled with NaN when it is given back, and again when it is handed out, so
that a read of a freed page, of a slot's old state, or past the end of one's own tokens shows in the
answer. Every answer is compared with that of the request alone.
"""

import math
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model
from toy_tokenizers import byte_level

from autodeploy.ladder import build_runner
from autodeploy.runtime.device_step import DeviceStep
from autodeploy.runtime.engine import EngineConfig, EngineCore
from autodeploy.runtime.grammars import grammars_of
from autodeploy.runtime.messages import EngineRequest, RequestFailed, one_by_one
from autodeploy.runtime.pages import NULL_PAGE
from autodeploy.runtime.sampling_params import SamplingParams
from autodeploy.runtime.scheduler import SchedulerConfig
from autodeploy.runtime.structured_params import StructuredOutputsParams as Structured
from autodeploy.transforms.recipe import load_recipe

VOCABULARY = 300
PAGE = 4
LONGEST = 64
EOS = 1
WAYS = ("one step after the other", "overlapped", "overlapped, staged for a device")
MODELS = ("llama", "gemma3_text", "mamba2", "falcon_h1")
PHASES = ("waiting", "prefill", "decoding", "preempted", "in flight")
SALTS = (None, "", "a", "b")

runners, answers, aborted = {}, {}, Counter()


def runner_of(name):
    if name not in runners:
        # With tied weights a tiny model says its last token again and again.
        model = tiny_model(name, vocab_size=VOCABULARY, tie_word_embeddings=False)
        runners[name] = build_runner(model, load_recipe("default")).runner
    return runners[name]


def grammars():
    return grammars_of(byte_level(VOCABULARY), VOCABULARY, [EOS])


def engine_of(name, way=WAYS[0], num_pages=200, **config):
    runner = runner_of(name)
    config = {
        "page_size": PAGE, "max_num_seqs": 4, "max_prefill_chunk": 6, "max_num_batched_tokens": 14,
        "max_model_len": LONGEST, **config,
    }  # fmt: skip
    scheduler = SchedulerConfig(**config)
    engine = EngineCore(
        runner, EngineConfig(scheduler, num_pages=num_pages, overlap=way != WAYS[0]),
        grammars=grammars,
    )  # fmt: skip
    if way == WAYS[2]:
        engine._step = DeviceStep(runner, engine._scheduler.tables, config["max_num_seqs"], ())
    fill_what_nobody_owns(engine)
    return engine


def fill_what_nobody_owns(engine, number=math.nan):
    caches = engine._runner._caches
    for group in engine._runner.contract.groups:
        own = [caches[member.input] for member in group.members]
        own = [cache for cache in own if cache.is_floating_point()]
        if group.per == "token":
            spoil_when_moved(engine._scheduler.tables.pools[group.name], own, number)
        else:
            spoil_when_moved(engine._scheduler.slots, own, number)


def spoil_when_moved(pool, caches, number):
    """Fills the place in `caches` whenever `pool` hands it out, or nobody can find it any more."""
    take, release = pool.take, pool.release

    def spoil(place):
        for cache in caches:
            cache[place] = number

    def take_spoiled():
        place = take()
        spoil(place)
        return place

    def release_spoiled(place):
        release(place)
        if place in pool._free:
            spoil(place)

    for place in (NULL_PAGE, *pool._free):
        spoil(place)
    pool.take, pool.release = take_spoiled, release_spoiled


def phase_of(engine, name):
    """Where a request is, as an abort finds it; None if it is over, or not there yet."""
    state = engine._requests.get(name)
    if state is None:
        return None
    if state.slot < 0:
        return "preempted" if state.metrics.preemptions else "waiting"
    if state.uses:
        return "in flight"
    return "prefill" if state.computed < state.prompt_tokens else "decoding"


def serve(engine, workload):
    """By request: tokens, logprobs, prompt logprobs and how it ended."""
    found = {request.request_id: [[], [], None, None] for request, _, _ in workload}
    last = max(max(arrival, abort or 0) for _, arrival, abort in workload)
    step = 0
    while engine.has_work or step <= last:
        for request, arrival, abort in workload:
            if arrival == step:
                engine.add(request)
            if abort == step:
                aborted[phase_of(engine, request.request_id)] += 1
                engine.abort([request.request_id])
        for output in one_by_one(engine.step()):
            record = found[output.request_id]
            assert record[3] is None, "nothing comes after the end"
            assert not isinstance(output, RequestFailed), output.message
            record[0] += output.token_ids
            record[1] += output.logprobs or []
            record[2] = output.prompt_logprobs or record[2]
            record[3] = output.finish_reason
        step += 1
        assert step < 2000, "the engine does not come to an end"
    return found


def request_of(name, prompt, params, **fields):
    return EngineRequest(
        request_id=name, prompt_token_ids=prompt, params=SamplingParams(**params),
        eos_token_ids=[EOS], **fields,
    )  # fmt: skip


def alone(name, prompt, params, seed):
    """The answer of an engine that has served nothing else."""
    key = (name, tuple(prompt), repr(params), seed)
    if key not in answers:
        engine = engine_of(name, enable_prefix_caching=False)
        answers[key] = serve(engine, [(request_of("0", prompt, params, seed=seed), 0, None)])["0"]
    return answers[key]


def assert_same(found, expected, *, cut):
    """cut: whether the answer may be the beginning of the expected one only."""
    count = len(found[0])
    assert found[0] == (expected[0][:count] if cut else expected[0])
    # Numbers of a batch's rows are rounded otherwise in a batch of another size.
    assert_close(found[1], expected[1][:count] if cut else expected[1])
    if not cut:
        assert_close(found[2] or [], expected[2] or [])
        assert found[3] == expected[3]


def assert_close(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        if ours is None or theirs is None:
            assert ours is theirs
            continue
        assert [one.token_id for one in ours] == [one.token_id for one in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)


PARAMS = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 14), "temperature": st.sampled_from([0.0, 0.0, 1.0])},
    optional={
        "logprobs": st.integers(0, 2),
        "prompt_logprobs": st.integers(0, 1),
        "repetition_penalty": st.just(1.4),
        "stop_token_ids": st.just(list(range(VOCABULARY // 2, VOCABULARY))),
        "structured_outputs": st.sampled_from(
            [Structured(regex="[a-f]{3,9}"), Structured(choice=["yes", "no"])]
        ),
    },
)
PROMPTS = st.builds(
    lambda shared, own: [*range(40, 40 + shared), *own],
    st.sampled_from([0, 4, 9, 16]),
    st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=14),
)
ASKED = st.tuples(
    PROMPTS, PARAMS,
    st.integers(0, 12),  # the step at which it comes
    st.integers(-1, 1),  # its priority
    st.sampled_from(SALTS),
    st.sampled_from([1, 1, 1, 3]),  # how many sequences
    st.none() | st.none() | st.integers(0, 16),  # how many steps later it is aborted
    st.none() | st.integers(0, 9),  # which earlier one it goes on from: prompt and answer
)  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(st.lists(ASKED, min_size=10, max_size=16), st.sampled_from([17, 18, 22]))
def test_who_else_comes_and_goes_never_shows_in_an_answer(name, way, asked, num_pages):
    workload, expected, told = [], {}, []
    for number, (prompt, params, arrival, priority, salt, n, abort, before) in enumerate(asked):
        if before is not None and before < number and len(told[before]) < LONGEST // 2:
            prompt = told[before] + prompt
            arrival += 8
            salt = asked[before][4]
        for sequence in range(n):
            one = f"{number}-{sequence}"
            fields = {"seed": 100 * number + sequence, "priority": priority, "cache_salt": salt}
            at = None if abort is None else arrival + abort
            workload.append((request_of(one, prompt, params, **fields), arrival, at))
            expected[one] = alone(name, prompt, params, fields["seed"])
        told.append(prompt + expected[f"{number}-0"][0])
    engine = engine_of(name, way, num_pages)
    for one, found in serve(engine, workload).items():
        if found[3] in (None, "abort"):
            assert asked[int(one.partition("-")[0])][6] is not None
        assert_same(found, expected[one], cut=found[3] in (None, "abort"))
    assert engine._scheduler.tables.used == 0
    assert engine._scheduler.slots.available == engine._scheduler.config.max_num_seqs


def test_those_aborts_met_requests_in_every_phase():
    if not aborted:
        pytest.skip("the tests above did not run")
    assert all(aborted[phase] for phase in PHASES), aborted


PROMPT = [*range(50, 50 + 4 * PAGE), 7]


def cached(engine, name, salt):
    """Prompt tokens of PROMPT that one more request finds in the cache, and its answer."""
    before = engine.stats().prefix_hits
    found = serve(engine, [(request_of(name, PROMPT, GREEDY, cache_salt=salt), 0, None)])[name]
    return engine.stats().prefix_hits - before, found


GREEDY = {"temperature": 0.0, "max_tokens": 6, "logprobs": 1}
# The last two look like what is hashed for other salts, or like tokens of a page.
ODD_SALTS = [
    None, "", " ", "salt ", "length 4 ", "x" * 100_000, "x" * 99_999, "é", "e\u0301", "\0", "\0\0",
    "🎉", "a", "A", "a ", "None", bytes(range(50, 54)).decode(),
    torch.tensor(PROMPT[:PAGE]).numpy().tobytes().decode(),
]  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_no_salt_finds_the_pages_of_another_and_each_finds_its_own(name):
    engine = engine_of(name, num_pages=400)
    first = [cached(engine, f"{n}", salt) for n, salt in enumerate(ODD_SALTS)]
    again = [cached(engine, f"again {n}", salt) for n, salt in enumerate(ODD_SALTS)]
    assert [hits for hits, _ in first] == [0] * len(ODD_SALTS)
    assert [hits for hits, _ in again] == [4 * PAGE] * len(ODD_SALTS)
    expected = alone(name, PROMPT, GREEDY, 0)
    for _, found in first + again:
        assert_same(found, expected, cut=False)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_pages_of_one_salt_do_not_reach_the_answers_of_another_whatever_is_in_them(name):
    engine = engine_of(name)
    expected = alone(name, PROMPT, GREEDY, 0)
    cached(engine, "a", "A")
    for cache in engine._runner.caches:
        cache.fill_(7.0)
    hits, found = cached(engine, "b", "B")
    assert hits == 0
    assert_same(found, expected, cut=False)
    # That the numbers were where they matter:
    hits, found = cached(engine, "again", "A")
    assert hits == 4 * PAGE
    with pytest.raises(AssertionError):
        assert_same(found, expected, cut=False)
