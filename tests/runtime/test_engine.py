import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_runner import POISON, VOCAB, OneByOneRunner, ToyRunner, greedy, logits_of

from autodeploy.errors import (
    EmptyPromptError,
    EngineError,
    InvalidRequestError,
    PromptTooLongError,
    UnknownTokenError,
)
from autodeploy.runtime.device_step import DeviceStep
from autodeploy.runtime.engine import EngineConfig, EngineCore
from autodeploy.runtime.messages import EngineRequest, RequestFailed, TokenOutput, one_by_one
from autodeploy.runtime.sampling_params import SamplingParams
from autodeploy.runtime.scheduler import SchedulerConfig

GROUPS = [
    ("tokens",),
    ("tokens", "window_5"),
    ("window_6",),
    ("sequences",),
    ("tokens", "sequences"),
    ("tokens", "window_5", "window_9", "sequences"),
]


WAYS = ("one step after the other", "overlapped", "overlapped, staged for a device")
way = WAYS[0]


@pytest.fixture(scope="module", autouse=True, params=WAYS)
def _every_way(request):
    global way
    way = request.param
    yield
    way = WAYS[0]


def engine_of(*groups, num_pages=60, runner=None, **config):
    config = {"page_size": 4, "max_num_seqs": 8, "max_prefill_chunk": 7, **config}
    runner = runner or ToyRunner(*groups)
    scheduler = SchedulerConfig(**config)
    engine = EngineCore(
        runner, EngineConfig(scheduler, num_pages=num_pages, overlap=way != WAYS[0])
    )
    if way == WAYS[2] and not runner.needs_requests:
        engine._step = DeviceStep(runner, engine._scheduler.tables, config["max_num_seqs"], ())
    return engine


def request(name, prompt, **options):
    fields = {key: options.pop(key) for key in ("priority", "cache_salt", "seed") if key in options}
    eos = options.pop("eos_token_ids", [])
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 5, **options})
    return EngineRequest(
        request_id=str(name), prompt_token_ids=prompt, params=params, eos_token_ids=eos, **fields
    )


class Client:
    """Collects what an engine says, by request."""

    def __init__(self, engine):
        self.engine = engine
        self.tokens, self.reasons, self.failures, self.outputs = {}, {}, {}, {}

    def step(self):
        for output in one_by_one(self.engine.step()):
            name = output.request_id
            assert name not in self.reasons, "nothing comes after the end"
            assert name not in self.failures
            if isinstance(output, RequestFailed):
                self.failures[name] = output
                continue
            self.outputs.setdefault(name, []).append(output)
            self.tokens.setdefault(name, []).extend(output.token_ids)
            if output.finish_reason:
                self.reasons[name] = (output.finish_reason, output.stop_reason)

    def run(self, limit=3000):
        while self.engine.has_work:
            self.step()
            limit -= 1
            assert limit, "the engine does not come to an end"
        return self

    def serve(self, *requests):
        for one in requests:
            self.engine.add(one)
        return self.run()


def serve(engine, *requests):
    return Client(engine).serve(*requests)


def assert_empty(engine):
    engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)


def workload(seed, count=24):
    """(prompt, output tokens, arrival step, priority); every third starts with one prefix."""
    source = random.Random(seed)
    prefix = [source.randrange(POISON) for _ in range(9)]
    for index in range(count):
        prompt = prefix[:] if index % 3 == 0 else []
        prompt += [source.randrange(POISON) for _ in range(source.randint(1, 20))]
        yield prompt, source.randint(1, 22), source.randint(0, 30), source.choice([0, 0, 0, 1])


@pytest.mark.parametrize("num_pages", [14, 200], ids=["tight", "roomy"])
@pytest.mark.parametrize("groups", GROUPS, ids="+".join)
def test_a_busy_engine_gives_the_tokens_of_each_sequence_alone(groups, num_pages):
    engine = engine_of(*groups, num_pages=num_pages)
    client = Client(engine)
    requests = list(workload(1))
    aborted = {"5": 3, "13": 0, "20": 6}
    step = 0
    while engine.has_work or step <= 30:
        for index, (prompt, count, arrival, priority) in enumerate(requests):
            if arrival == step:
                engine.add(request(index, prompt, max_tokens=count, priority=priority))
        client.step()
        for name, after in aborted.items():
            if len(client.tokens.get(name, [])) >= after:
                engine.abort([name])
        step += 1
        assert step < 2000
    for index, (prompt, count, _, _) in enumerate(requests):
        name, found = str(index), client.tokens.get(str(index), [])
        assert found == greedy(prompt, count, groups)[: len(found)]
        if client.reasons.get(name) != ("abort", None):
            assert client.reasons[name] == ("length", None)
            assert len(found) == count
    assert_empty(engine)
    stats = engine.stats()
    assert stats.finished + stats.aborted == len(requests)
    assert 1 <= stats.aborted <= 3
    assert (stats.preemptions > 0) == (num_pages == 14 and groups != ("sequences",))
    assert (stats.prefix_hits > 0) == ("sequences" not in groups)
    assert sorted(engine._runner.released) == sorted(map(str, range(len(requests))))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    groups=st.sampled_from(GROUPS),
    num_pages=st.integers(12, 30),
    page_size=st.integers(3, 5),
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(1, 24),
    chunk=st.sampled_from([None, 1, 7]),
)
def test_no_budget_changes_the_tokens(
    seed, groups, num_pages, page_size, max_num_seqs, budget, chunk
):
    engine = engine_of(
        *groups,
        num_pages=num_pages,
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_prefill_chunk=chunk,
    )
    requests = list(workload(seed, count=8))
    client = serve(
        engine,
        *(request(i, p, max_tokens=n, priority=rank) for i, (p, n, _, rank) in enumerate(requests)),
    )
    for index, (prompt, count, _, _) in enumerate(requests):
        room = engine.max_model_len - len(prompt)
        assert client.tokens[str(index)] == greedy(prompt, min(count, room), groups)
    assert_empty(engine)


def test_prefix_reuse_gives_the_same_tokens():
    engine = engine_of("tokens", "window_5")
    prompt = [7, 3, 9, 1, 4, 4, 2, 8, 6, 5, 0, 1, 3]
    first = serve(engine, request("a", prompt)).tokens["a"]
    again = Client(engine)
    outputs = again.serve(request("b", prompt), request("c", [*prompt[:9], 15])).outputs
    assert again.tokens["b"] == first
    assert again.tokens["c"] == greedy([*prompt[:9], 15], 5, ["tokens", "window_5"])
    assert outputs["b"][-1].metrics.cached_tokens == 12
    assert outputs["c"][-1].metrics.cached_tokens == 8
    assert engine.stats().prefix_hits == 20


def test_requests_of_different_salts_share_nothing():
    engine = engine_of("tokens")
    prompt = list(range(13))
    serve(engine, request("a", prompt, cache_salt="one"))
    outputs = serve(engine, request("b", prompt, cache_salt="two"), request("c", prompt)).outputs
    assert [outputs[name][-1].metrics.cached_tokens for name in "bc"] == [0, 0]


def test_a_runner_of_whole_sequences_gives_the_same_tokens():
    runner = OneByOneRunner()
    engine = engine_of(runner=runner, max_num_seqs=3)
    requests = list(workload(3, count=9))
    client = serve(
        engine, *(request(i, p, max_tokens=n) for i, (p, n, _, _) in enumerate(requests))
    )
    for index, (prompt, count, _, _) in enumerate(requests):
        assert client.tokens[str(index)] == greedy(prompt, count, ["tokens"])
    assert len(runner.released) == 9


def test_eos_ends_a_request_unless_it_is_ignored():
    prompt = [5, 6, 7]
    tokens = greedy(prompt, 6, ["tokens"])
    eos, place = tokens[3], tokens.index(tokens[3])
    client = serve(
        engine_of("tokens"),
        request("stops", prompt, max_tokens=6, eos_token_ids=[eos]),
        request("ignores", prompt, max_tokens=6, eos_token_ids=[eos], ignore_eos=True),
    )
    assert client.tokens["stops"] == tokens[: place + 1]
    assert client.reasons["stops"] == ("stop", None)
    assert client.tokens["ignores"] == tokens
    assert client.reasons["ignores"] == ("length", None)


def test_a_stop_token_is_named_as_the_reason():
    prompt = [5, 6, 7]
    tokens = greedy(prompt, 6, ["tokens"])
    client = serve(engine_of("tokens"), request("a", prompt, stop_token_ids=[tokens[1]]))
    assert client.tokens["a"] == tokens[: tokens.index(tokens[1]) + 1]
    assert client.reasons["a"] == ("stop", tokens[1])


def test_min_tokens_keeps_a_request_from_stopping():
    prompt = [5, 6, 7]
    eos = greedy(prompt, 1, ["tokens"])[0]
    client = serve(
        engine_of("tokens"),
        request("a", prompt, max_tokens=9, min_tokens=4, eos_token_ids=[eos]),
    )
    assert client.tokens["a"][:4] == greedy(prompt, 4, ["tokens"], bad={eos})
    assert eos not in client.tokens["a"][:4]


def test_the_sampler_is_told_what_was_generated():
    prompt = [5, 6, 7]
    first, second = greedy(prompt, 2, ["tokens"])
    client = serve(
        engine_of("tokens"),
        request("a", prompt, max_tokens=2, bad_words_token_ids=[[first, second]]),
    )
    assert client.tokens["a"] == [
        first,
        *greedy([*prompt, first], 1, ["tokens"], bad={second}),
    ]


def test_without_max_tokens_the_context_is_filled():
    client = serve(engine_of("tokens", num_pages=100), request("a", [1, 2, 3], max_tokens=None))
    assert client.tokens["a"] == greedy([1, 2, 3], 61, ["tokens"])
    assert client.reasons["a"] == ("length", None)


def test_a_full_context_ends_a_request_that_wants_more():
    client = serve(engine_of("tokens"), request("a", [1] * 60, max_tokens=100))
    assert len(client.tokens["a"]) == 4
    assert client.reasons["a"] == ("length", None)


def test_sequences_end_where_the_pages_do():
    engine = engine_of("tokens", num_pages=6)
    assert engine.max_model_len == 20
    client = serve(engine, request("a", [1] * 10, max_tokens=50), request("b", [2] * 19))
    assert [len(client.tokens[name]) for name in "ab"] == [10, 1]


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], EmptyPromptError, "no tokens"),
        ([1] * 64, PromptTooLongError, "64 tokens and sequences end at 64.*use at most 63"),
        ([1, 2, VOCAB], UnknownTokenError, f"token id {VOCAB} at position 2"),
        ([1, -3, 2], UnknownTokenError, "token id -3 at position 1"),
    ],
)
def test_bad_prompts_are_refused_and_nothing_else_is_touched(prompt, error, message):
    engine = engine_of("tokens")
    client = Client(engine)
    engine.add(request("good", [1, 2, 3]))
    client.step()
    with pytest.raises(error, match=message):
        engine.add(request("bad", prompt))
    assert client.run().tokens == {"good": greedy([1, 2, 3], 5, ["tokens"])}
    assert_empty(engine)


def test_params_that_name_unknown_tokens_are_refused():
    engine = engine_of("tokens")
    with pytest.raises(InvalidRequestError):
        engine.add(request("bad", [1], logit_bias={VOCAB: 1.0}))
    assert not engine.has_work
    assert serve(engine, request("bad", [1])).tokens["bad"] == greedy([1], 5, ["tokens"])


def test_an_id_cannot_be_used_twice_at_once():
    engine = engine_of("tokens")
    engine.add(request("a", [1]))
    with pytest.raises(InvalidRequestError, match="'a' is already running"):
        engine.add(request("a", [2]))
    assert Client(engine).run().tokens["a"] == greedy([1], 5, ["tokens"])
    assert serve(engine, request("a", [2])).tokens["a"] == greedy([2], 5, ["tokens"])


def test_nan_logits_fail_their_request_only():
    engine = engine_of("tokens", "window_5")
    groups = ["tokens", "window_5"]
    good = [[1, 2], [3, 3, 3, 3, 3, 3]]
    bad = request("bad", [*range(12), POISON])
    client = serve(engine, request("a", good[0]), bad, request("b", good[1]))
    assert client.tokens == {"a": greedy(good[0], 5, groups), "b": greedy(good[1], 5, groups)}
    failure = client.failures["bad"]
    assert failure.error == EngineError.__name__
    assert "'bad' cannot go on after 13 tokens" in failure.message
    assert "NaN" in failure.message
    assert_empty(engine)
    again = serve(engine, request("again", list(range(13))))
    assert again.tokens["again"] == greedy(list(range(13)), 5, groups)
    assert again.outputs["again"][-1].metrics.cached_tokens == 0, "its pages are not shared"


def test_abort_frees_waiting_and_running_requests():
    engine = engine_of("tokens", max_num_seqs=1)
    client = Client(engine)
    for name in ("running", "waiting", "stays"):
        engine.add(request(name, [1, 2, 3, 4, 5]))
    client.step()
    client.step()
    engine.abort(["running", "waiting", "unknown"])
    client.run()
    assert client.reasons["running"] == client.reasons["waiting"] == ("abort", None)
    assert client.tokens["stays"] == greedy([1, 2, 3, 4, 5], 5, ["tokens"])
    assert engine.stats().aborted == 2
    assert_empty(engine)


def test_prompt_logprobs_come_once_with_the_first_token():
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    engine = engine_of("tokens", max_prefill_chunk=4)
    serve(engine, request("warm", prompt))
    client = serve(
        engine,
        request("a", prompt, prompt_logprobs=2, logprobs=1),
        request("b", prompt, max_tokens=3),
    )
    first, *rest = client.outputs["a"]
    assert all(output.prompt_logprobs is None for output in [*rest, *client.outputs["b"]])
    assert first.prompt_logprobs[0] is None
    assert len(first.prompt_logprobs) == len(prompt)
    for place in range(1, len(prompt)):
        logprobs = torch.log_softmax(logits_of(prompt[:place], ["tokens"]), -1)
        given, best, _ = first.prompt_logprobs[place]
        assert given.token_id == prompt[place]
        assert given.logprob == pytest.approx(float(logprobs[prompt[place]]), abs=1e-5)
        assert given.rank == 1 + int((logprobs > logprobs[prompt[place]]).sum())
        assert best.token_id == int(logprobs.argmax())
        assert best.rank == 1
    tokens = greedy(prompt, 5, ["tokens"])
    assert [output.logprobs[0][0].token_id for output in client.outputs["a"]] == tokens
    assert client.outputs["b"][0].logprobs is None


def test_a_seed_gives_the_same_tokens_whatever_else_runs():
    options = {"temperature": 1.5, "max_tokens": 24, "seed": 11}
    alone = serve(engine_of("tokens"), request("a", [1, 2, 3], **options)).tokens["a"]
    crowd = [request(i, [i] * 4, max_tokens=24, temperature=1.0, seed=i) for i in range(3)]
    busy = serve(engine_of("tokens", num_pages=14), *crowd, request("a", [1, 2, 3], **options))
    assert busy.tokens["a"] == alone
    assert busy.outputs["a"][-1].metrics.preemptions > 0


def test_metrics_say_when_and_how_often():
    engine = engine_of("tokens", num_pages=8)
    client = serve(
        engine, request("a", [1] * 9, max_tokens=16), request("b", [2] * 5, max_tokens=16)
    )
    metrics = {name: outputs[-1].metrics for name, outputs in client.outputs.items()}
    for found in metrics.values():
        assert found.first_scheduled_time <= found.first_token_time <= found.finished_time
    assert metrics["a"].preemptions == 0
    assert metrics["b"].preemptions == engine.stats().preemptions > 0


def test_stats_count_what_happened():
    engine = engine_of("tokens", max_num_seqs=2)
    for name in "abc":
        engine.add(request(name, [1, 2, 3, 4, 5, 6], max_tokens=2))
    engine.step()
    stats = engine.stats()
    assert (stats.step, stats.running, stats.waiting) == (1, 2, 1)
    # Overlapped, the tokens of the first step come with the second.
    generated = 2 if way == WAYS[0] else 0
    assert (stats.scheduled_tokens, stats.generated_tokens) == (12, generated)
    assert stats.pages_used == 4
    assert stats.pages_total == 59
    Client(engine).run()
    assert stats.step == 1, "a copy does not change"
    stats = engine.stats()
    assert (stats.finished, stats.generated_tokens, stats.running) == (3, 6, 0)
    assert stats.prefix_queries == 18


def test_close_releases_every_request():
    runner = ToyRunner("tokens")
    engine = engine_of(runner=runner)
    engine.add(request("a", [1, 2]))
    engine.step()
    engine.add(request("b", [1, 2]))
    engine.close()
    assert sorted(runner.released) == ["a", "b"]
    assert not engine.has_work


def test_logits_of_the_wrong_shape_are_an_engine_error():
    class Short(ToyRunner):
        def forward(self, inputs):
            return super().forward(inputs)[:, :-1]

    engine = engine_of(runner=Short("tokens"))
    engine.add(request("a", [1, 2]))
    with pytest.raises(EngineError, match=r"logits \[1, 22\] where \[1, 23\] were needed"):
        engine.step()


def test_outputs_are_one_token_each():
    client = serve(engine_of("tokens"), request("a", [1, 2]))
    assert all(isinstance(output, TokenOutput) for output in client.outputs["a"])
    assert [len(output.token_ids) for output in client.outputs["a"]] == [1] * 5
