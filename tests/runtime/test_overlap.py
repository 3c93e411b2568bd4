"""Steps that overlap give what steps one after the other give, whatever happens to requests."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_device_step import ReplayedStep
from toy_runner import POISON, VOCAB, ToyRunner

from autodeploy.runtime import device_step
from autodeploy.runtime.device_step import DeviceStep
from autodeploy.runtime.engine import EngineConfig, EngineCore
from autodeploy.runtime.messages import EngineRequest, RequestFailed, one_by_one
from autodeploy.runtime.sampler import Sampler
from autodeploy.runtime.sampling_params import SamplingParams
from autodeploy.runtime.scheduler import SchedulerConfig

GROUPS = [("tokens",), ("tokens", "window_5"), ("tokens", "sequences"), ("window_6", "sequences")]
SLOTS = 5


class LateSampler(Sampler):
    """As on an accelerator: what the host needs of a step is read when its result is asked for."""

    def launch(self, logits, rows):
        table = self._entries(logits, rows)
        return self._on(logits.device).launch(logits, table, rows, self._rules_of(table, rows))


@pytest.fixture(autouse=True)
def _padded_steps(monkeypatch):
    monkeypatch.setattr(
        device_step.DecodeGraph,
        "capture",
        staticmethod(lambda step, size, pool: ReplayedStep(step, size)),
    )


def engine_of(groups, num_pages, overlap, on_device, grammars=None, slots=SLOTS):
    runner = ToyRunner(*groups, max_positions=40)
    config = SchedulerConfig(
        page_size=4, max_num_seqs=slots, max_prefill_chunk=6, max_num_batched_tokens=14
    )
    sampler = LateSampler(VOCAB, 1)
    config = EngineConfig(config, None, 0.9, num_pages, overlap)
    engine = EngineCore(runner, config, sampler, grammars)
    if on_device:
        slots = engine._scheduler.config.max_num_seqs
        engine._step = DeviceStep(runner, engine._scheduler.tables, slots, (1, 3))
    return engine


PARAMS = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 16), "temperature": st.sampled_from([0.0, 0.0, 1.5])},
    optional={
        "stop_token_ids": st.lists(st.integers(0, VOCAB - 2), max_size=4),
        "min_tokens": st.just(1),
        "logprobs": st.integers(0, 2),
        "prompt_logprobs": st.integers(0, 2),
        "repetition_penalty": st.just(1.4),
        "bad_words_token_ids": st.just([[3, 4], [7]]),
        "top_k": st.just(5),
    },
)
PROMPTS = st.builds(
    lambda shared, own, poison: list(range(shared)) + own + [POISON] * poison,
    st.sampled_from([0, 0, 9]),
    st.lists(st.integers(0, POISON - 1), min_size=1, max_size=14),
    st.sampled_from([0, 0, 0, 0, 0, 0, 1]),
)
ARRIVALS = st.tuples(
    PROMPTS, PARAMS, st.integers(0, 12), st.integers(-1, 1), st.none() | st.integers(0, 25)
)


def serve(engine, workload):
    """By request: tokens, logprobs, prompt logprobs and how it ended."""
    found = {str(n): [[], [], None, None] for n in range(len(workload))}
    step = 0
    while engine.has_work or step <= 26:
        for n, (prompt, params, arrival, priority, abort) in enumerate(workload):
            if arrival == step:
                engine.add(
                    EngineRequest(
                        request_id=str(n),
                        prompt_token_ids=prompt,
                        params=SamplingParams(**params),
                        priority=priority,
                        seed=n,
                    )
                )
            if abort == step:
                engine.abort([str(n)])
        for output in one_by_one(engine.step()):
            record = found[output.request_id]
            assert record[3] is None, "nothing comes after the end"
            if isinstance(output, RequestFailed):
                record[3] = output.message
                continue
            record[0] += output.token_ids
            record[1] += output.logprobs or []
            record[2] = output.prompt_logprobs or record[2]
            if output.finish_reason:
                record[3] = (output.finish_reason, output.stop_reason)
        step += 1
        assert step < 1500, "the engine does not come to an end"
    return found


def assert_nothing_is_held(engine):
    scheduler = engine._scheduler
    assert scheduler.tables.used == 0
    assert scheduler.slots.available == scheduler.config.max_num_seqs
    assert (scheduler.running, scheduler.num_waiting) == ([], 0)
    assert sorted(engine._free_rows) == list(range(engine._num_rows))
    assert not engine._sampler._table["live"].any()
    assert all(np.all(table == 0) for table in scheduler.tables.tables.values())


@pytest.mark.parametrize("groups", GROUPS, ids="+".join)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(ARRIVALS, min_size=1, max_size=9), st.sampled_from([12, 16, 80]))
def test_overlapped_steps_give_what_steps_one_after_the_other_give(groups, workload, num_pages):
    alone = serve(
        engine_of(groups, 120, overlap=False, on_device=False),
        [(*one[:4], None) for one in workload],
    )
    for overlap, on_device in ((False, False), (True, False), (True, True)):
        engine = engine_of(groups, num_pages, overlap, on_device)
        found = serve(engine, workload)
        for name, (tokens, logprobs, prompt_logprobs, end) in found.items():
            expected = alone[name]
            if end is None or end == ("abort", None):
                assert workload[int(name)][4] is not None
                assert tokens == expected[0][: len(tokens)]
                assert logprobs == expected[1][: len(logprobs)]
            else:
                assert [tokens, logprobs, prompt_logprobs, end] == expected
        assert_nothing_is_held(engine)
