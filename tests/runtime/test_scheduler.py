import logging
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from toy_runner import contract_of

from autodeploy.custom_ops.step import FIELDS
from autodeploy.errors import ConfigError
from autodeploy.runtime.caches import plan_caches
from autodeploy.runtime.letters import LetterWriter
from autodeploy.runtime.messages import EngineRequest
from autodeploy.runtime.pages import NULL_PAGE
from autodeploy.runtime.request import RequestState
from autodeploy.runtime.sampling_params import SamplingParams
from autodeploy.runtime.scheduler import PROMPT_LOGPROB_ROWS, Scheduler, SchedulerConfig


class Harness:
    """A scheduler whose steps run on a list: page -> the tokens written to each of its places."""

    def __init__(self, *groups, num_pages=24, max_model_len=64, **config):
        self.config = SchedulerConfig(**{"page_size": 4, "max_num_seqs": 4, **config})
        contract = contract_of(*groups, max_positions=max_model_len)
        caches = plan_caches(contract, self.config, num_pages=num_pages)
        self.max_model_len = caches.max_model_len
        self.scheduler = Scheduler(self.config, contract, caches.num_pages, self.max_model_len)
        self.written = {name: {} for name in self.scheduler.tables.pools}
        self.letters = np.zeros((3, len(FIELDS) + len(self.written), 4), dtype=np.int32)
        self.writer = self.new_writer()
        self.live = []
        self.done = []
        self.arrivals = 0

    def add(self, prompt, max_tokens=4, priority=0, salt=None, prompt_logprobs=None):
        params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
        request = EngineRequest(
            request_id=str(self.arrivals),
            prompt_token_ids=list(prompt),
            params=params,
            priority=priority,
            cache_salt=salt,
        )
        state = RequestState(request, self.arrivals, self.arrivals, self.max_model_len)
        self.arrivals += 1
        self.scheduler.add(state)
        self.live.append(state)
        return state

    def finish(self, state, forget=False):
        self.scheduler.finish(state, forget=forget)
        self.live.remove(state)
        self.done.append(state)

    def step(self, token=lambda state: state.known % 3):
        """Plans a step, runs it and gives it as {request: (start, count)}."""
        plan = self.scheduler.schedule()
        self.check(plan)
        self.check_letter(plan)
        for state, start, count in zip(plan.requests, plan.starts, plan.counts, strict=True):
            self.write(state, int(start), int(count))
        for state, start, count in zip(plan.requests, plan.starts, plan.counts, strict=True):
            self.read(state, int(start), int(count))
        self.scheduler.advance(plan)
        self.scheduler.publish(plan)
        for rows in plan.prompt_rows:
            plan.requests[rows.at].prompt_logprobs += [[]] * rows.count
        result = {}
        for state, start, count, samples in zip(
            list(plan.requests), plan.starts, plan.counts, plan.samples, strict=True
        ):
            result[state] = (int(start), int(count))
            if samples:
                assert not state.missing_prompt_logprobs
                state.append(token(state))
                if state.finish_reason()[0]:
                    self.finish(state)
        self.check_pages()
        return result

    def run(self, limit=2000):
        steps = 0
        while self.live:
            self.step()
            steps += 1
            assert steps < limit, "some requests never finish"
        return steps

    def check(self, plan):
        """The plan keeps the budgets and always advances the first in the order."""
        running = self.scheduler.running
        assert len(running) <= self.config.max_num_seqs
        assert sorted(running, key=lambda r: r.key) == running
        assert len({state.slot for state in running}) == len(running)
        assert all(state in running for state in plan.requests)
        assert plan.num_tokens <= self.config.max_num_batched_tokens
        assert (plan.counts >= 1).all()
        assert (plan.counts <= (self.config.max_prefill_chunk or 10**9)).all()
        if self.live:
            first = min(self.live, key=lambda r: r.key)
            assert first in plan.requests or first not in running
            assert running[0] in plan.requests
        for ours in self.live:
            if ours not in running and not ours.metrics.preemptions:
                overtaken = [r for r in running if r.key > ours.key and r.key[0] == ours.key[0]]
                assert not overtaken, "first come, first served"

    def new_writer(self):
        tables = list(self.scheduler.tables.tables.values())
        return LetterWriter(tables, self.config.page_size, letters=3, spare_slot=9)

    def check_letter(self, plan):
        """A letter that is brought up to date says what one says that is written anew."""
        if not plan.only_decodes or not len(plan):
            return
        at = self.scheduler.tables.used % 3
        size = min(4, len(plan) + plan.num_tokens % 2)
        new = np.full_like(self.letters[0], -5)
        self.writer.write(at, self.letters[at], plan, size)
        self.new_writer().write(0, new, plan, size)
        assert (self.letters[at][:, :size] == new[:, :size]).all()

    def places(self, group, state, positions):
        table, size = self.scheduler.tables.tables[group], self.config.page_size
        for position in positions:
            page = int(table[state.slot, position // size])
            assert page != NULL_PAGE
            yield page, position % size

    def write(self, state, start, count):
        for group, written in self.written.items():
            pool = self.scheduler.tables.pools[group]
            places = self.places(group, state, range(start, start + count))
            for position, (page, offset) in enumerate(places, start):
                assert pool._holders[page] == 1, "a page is written while others hold it"
                history = (state.request.cache_salt, *state.tokens[: position + 1].tolist())
                written[page, offset] = history

    def read(self, state, start, count):
        """Every token a query may look at is where the block table says it is."""
        for group, written in self.written.items():
            window = self.scheduler.tables.pools[group].window
            first = max(0, start - window + 1) if window else 0
            places = self.places(group, state, range(first, start + count))
            for position, place in enumerate(places, first):
                history = (state.request.cache_salt, *state.tokens[: position + 1].tolist())
                assert written[place] == history

    def check_pages(self):
        """No page is lost, owned by two that do not share it, or free while someone holds it."""
        tables = self.scheduler.tables
        slots = [state.slot for state in self.scheduler.running]
        for name, pool in tables.pools.items():
            held = tables.tables[name]
            assert not np.delete(held, slots, axis=0).any()
            holders = Counter(held[slots].ravel().tolist())
            del holders[NULL_PAGE]
            assert pool._holders == [holders[page] for page in range(pool.num_pages)]
            states = [*holders, *pool._idle, *pool._free]
            assert sorted(states) == list(range(1, pool.num_pages))
            assert all(pool._hashes[page] == hash for hash, page in pool._pages.items())
            assert all(pool._hashes[page] is not None for page in pool._idle)
        assert self.scheduler.num_waiting == len(self.live) - len(slots)
        assert self.scheduler.slots.available == self.config.max_num_seqs - len(slots)


GROUPS = [("tokens",), ("tokens", "window_5"), ("window_3",), ("tokens", "sequences"), ()]


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run, are aborted and fail, in any order, with hardly any pages."""

    @initialize(
        groups=st.sampled_from(GROUPS),
        num_pages=st.integers(5, 14),
        page_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 4),
        budget=st.integers(1, 12),
        chunk=st.sampled_from([None, 1, 3, 7]),
        caching=st.sampled_from([True, True, False]),
    )
    def start(self, groups, num_pages, page_size, max_num_seqs, budget, chunk, caching):
        self.harness = Harness(
            *groups,
            num_pages=num_pages,
            max_model_len=24,
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_prefill_chunk=chunk,
            enable_prefix_caching=caching,
        )

    @precondition(lambda self: len(self.harness.live) < 8)
    @rule(
        # Few tokens and lengths, so that prefixes are shared.
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=18),
        max_tokens=st.integers(1, 9),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        salt=st.sampled_from([None, None, "salt"]),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
    )
    def add(self, prompt, max_tokens, priority, salt, prompt_logprobs):
        prompt = prompt[: self.harness.max_model_len - 1]
        self.harness.add(prompt, max_tokens, priority, salt, prompt_logprobs)

    @rule(token=st.integers(0, 1), times=st.integers(1, 3))
    def step(self, token, times):
        for _ in range(times):
            self.harness.step(lambda state: token)

    @precondition(lambda self: self.harness.live)
    @rule(data=st.data(), forget=st.booleans())
    def end(self, data, forget):
        state = data.draw(st.sampled_from(self.harness.live))
        self.harness.finish(state, forget)
        self.harness.check_pages()

    def teardown(self):
        if hasattr(self, "harness"):
            self.harness.run()
            assert self.harness.scheduler.tables.used == 0
            assert not self.harness.scheduler.has_requests


TestSchedules = SchedulerMachine.TestCase
TestSchedules.settings = settings(max_examples=250, stateful_step_count=50, deadline=None)


def test_all_known_tokens_are_computed_before_one_is_sampled():
    harness = Harness("tokens", max_prefill_chunk=7)
    state = harness.add(range(17), max_tokens=2)
    steps = [harness.step()[state] for _ in range(4)]
    assert steps == [(0, 7), (7, 7), (14, 3), (17, 1)]


def test_decoding_requests_come_before_prompts_under_the_budget():
    harness = Harness("tokens", max_num_batched_tokens=8)
    first = harness.add(range(4))
    second = harness.add(range(10, 14))
    harness.step()
    third = harness.add(range(20, 40))
    assert harness.step() == {first: (4, 1), second: (4, 1), third: (0, 6)}


def test_the_first_request_advances_when_decoding_ones_want_the_whole_budget():
    harness = Harness("tokens", max_num_batched_tokens=2, max_prefill_chunk=1)
    decoding = harness.add([1], priority=1, max_tokens=20)
    harness.step()
    late = harness.add([1, 2, 3], priority=1, max_tokens=20)
    early = harness.add(range(9), max_tokens=2)
    while early in harness.live:
        assert early in harness.step()
    assert {decoding, late} <= set(harness.live)
    harness.run()


def test_a_better_priority_takes_the_pages_of_a_worse_one():
    harness = Harness("tokens", num_pages=7)
    worse = harness.add(range(16), max_tokens=8, priority=5)
    harness.step()
    better = harness.add(range(30, 50), max_tokens=2, priority=1)
    assert list(harness.step()) == [better]
    assert worse.metrics.preemptions == 1
    assert worse.slot == -1
    harness.run()
    assert worse.known == 24


def test_equal_priorities_do_not_preempt_for_admission():
    harness = Harness("tokens", num_pages=7)
    early = harness.add(range(16), max_tokens=8)
    harness.step()
    late = harness.add(range(30, 50), max_tokens=2)
    while early in harness.live:
        assert list(harness.step()) == [early]
    assert early.metrics.preemptions == 0
    assert list(harness.step()) == [late]


def test_a_preempted_request_keeps_its_tokens_and_its_place():
    harness = Harness("tokens", num_pages=9)
    early = harness.add(range(12), max_tokens=16)
    late = harness.add(range(30, 40), max_tokens=12)
    while not late.metrics.preemptions:
        harness.step()
    tokens = late.tokens.tolist()
    assert len(tokens) > 10
    third = harness.add(range(60, 70))
    while early in harness.live:
        assert third not in harness.step()
    plan = harness.step()
    assert late in plan
    start, count = plan[late]
    # It resumes behind the pages that are still there.
    assert start > 0
    assert start + count == len(tokens)
    assert late.tokens.tolist()[: len(tokens)] == tokens
    harness.run()
    assert late.known == 22


def test_a_request_without_pages_pauses_and_keeps_what_it_has():
    harness = Harness("tokens", num_pages=6, page_size=8)
    early = harness.add(range(15), max_tokens=9)
    late = harness.add(range(30, 44), max_tokens=9)
    paused = 0
    while early in harness.live:
        paused += late not in harness.step()
    assert paused > 3
    assert late.metrics.preemptions == 0
    assert harness.step() == {late: (16, 1)}


def test_shared_prefixes_are_computed_once():
    harness = Harness("tokens")
    harness.add(range(14))
    harness.run()
    again = harness.add([*range(12), 90, 91, 92])
    assert harness.step()[again] == (12, 3)
    assert again.metrics.cached_tokens == 12
    assert harness.scheduler.prefix_hits == 12
    assert harness.scheduler.prefix_queries == 29


def test_at_least_one_prompt_token_is_computed():
    harness = Harness("tokens")
    harness.add(range(12))
    harness.run()
    again = harness.add(range(12))
    assert harness.step()[again] == (8, 4)


def test_generated_tokens_are_shared_too():
    harness = Harness("tokens")
    first = harness.add(range(6), max_tokens=8)
    harness.run()
    again = harness.add([*first.tokens.tolist(), 50])
    assert harness.step()[again] == (12, 3)


def test_salts_keep_prefixes_apart():
    harness = Harness("tokens")
    harness.add(range(14), salt="a")
    harness.run()
    other, same = harness.add(range(14), salt="b"), harness.add(range(14), salt="a")
    plan = harness.step()
    assert plan[other] == (0, 14)
    assert plan[same] == (12, 2)


def test_pages_of_a_failed_request_are_not_shared():
    harness = Harness("tokens", "window_5")
    bad = harness.add(range(14), max_tokens=9)
    for _ in range(3):
        harness.step()
    harness.finish(bad, forget=True)
    again = harness.add(range(14))
    assert harness.step()[again] == (0, 14)


def test_requests_that_want_prompt_logprobs_compute_their_whole_prompt():
    harness = Harness("tokens")
    harness.add(range(14))
    harness.run()
    state = harness.add(range(14), prompt_logprobs=1)
    plan = harness.scheduler.schedule()
    assert plan.starts.tolist() == [0]
    (rows,) = plan.prompt_rows
    assert (rows.position, rows.count) == (0, 13)
    assert plan.requests == [state]


def test_prompt_logprobs_are_not_computed_twice_after_preemption():
    harness = Harness("tokens", num_pages=7)
    state = harness.add(range(16), max_tokens=8, priority=5, prompt_logprobs=1)
    for _ in range(3):
        harness.step()
    assert len(state.prompt_logprobs) == 16
    harness.add(range(30, 50), max_tokens=2)
    harness.run()
    assert state.metrics.preemptions == 1
    assert len(state.prompt_logprobs) == 16


def test_prompt_logprob_rows_of_a_step_are_limited():
    many = 2 * PROMPT_LOGPROB_ROWS
    harness = Harness("tokens", num_pages=400, max_model_len=2 * many)
    first = harness.add([1] * many, prompt_logprobs=0)
    second = harness.add([2] * 9, prompt_logprobs=0)
    assert harness.step() == {first: (0, PROMPT_LOGPROB_ROWS)}
    # The last prompt token scores nothing: one row is left for the next request.
    assert harness.step() == {first: (PROMPT_LOGPROB_ROWS, PROMPT_LOGPROB_ROWS), second: (0, 1)}


def test_pages_that_leave_a_window_admit_who_waits_for_them():
    harness = Harness("window_8", num_pages=12, max_model_len=200, page_size=2)
    first = harness.add(range(12), max_tokens=100)
    second = harness.add(range(20, 32), max_tokens=100)
    for _ in range(40):
        harness.step()
    assert first.computed > 40
    assert second.computed > 0


def test_a_window_lets_a_sequence_outgrow_its_pages():
    harness = Harness("window_5", num_pages=5)
    state = harness.add(range(40), max_tokens=20)
    harness.run()
    assert state.known == 60


def test_prefix_caching_is_off_with_recurrent_state_and_says_so_once(caplog):
    with caplog.at_level(logging.INFO):
        harness = Harness("tokens", "sequences")
    assert [r.message for r in caplog.records if "prefix caching is off" in r.message]
    assert len(caplog.records) == 1
    harness.add(range(14))
    harness.run()
    again = harness.add(range(14))
    assert harness.step()[again] == (0, 14)
    assert harness.scheduler.prefix_queries == 0


def test_a_steady_stream_starves_nobody():
    harness = Harness("tokens", num_pages=9, max_num_batched_tokens=8)
    for _ in range(4):
        harness.add(range(10), max_tokens=8)
    for step in range(300):
        harness.add([step % 7] * 5, max_tokens=6)
        harness.step()
        if step >= 100:
            # Each takes at most 13 steps alone, and only earlier ones go first.
            assert len(harness.done) > step // 13
    finished = [int(state.request_id) for state in harness.done]
    assert set(range(len(finished) - 4)) <= set(finished)


def test_senseless_budgets_are_refused():
    with pytest.raises(ConfigError, match="max_num_seqs=0"):
        SchedulerConfig(max_num_seqs=0)
