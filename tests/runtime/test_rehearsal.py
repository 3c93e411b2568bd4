"""What an engine serves before the first request leaves nothing behind."""

import logging

from toy_runner import ToyRunner

from autodeploy.runtime.engine import EngineConfig, EngineCore
from autodeploy.runtime.messages import EngineRequest, one_by_one
from autodeploy.runtime.rehearsal import rehearse
from autodeploy.runtime.sampling_params import SamplingParams
from autodeploy.runtime.scheduler import SchedulerConfig

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def engine_of(**changes):
    config = SchedulerConfig(
        page_size=4, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, **changes
    )
    return EngineCore(ToyRunner("tokens"), EngineConfig(config, num_pages=40))


def answer(engine):
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    engine.add(EngineRequest(request_id="a", prompt_token_ids=PROMPT, params=params))
    tokens = []
    while engine.has_work:
        for output in one_by_one(engine.step()):
            tokens += output.token_ids
    return tokens


def test_answers_and_counts_are_those_of_an_engine_that_served_nothing():
    engine, other = engine_of(), engine_of()
    rehearse(engine)
    assert engine.stats() == other.stats()
    assert not engine.has_work
    assert answer(engine) == answer(other)
    seconds = {"step_seconds": 0.0, "waited_seconds": 0.0}
    found, expected = (
        {f: getattr(e.stats(), f) for f in e.stats().__struct_fields__} | seconds
        for e in (engine, other)
    )
    assert found == expected


def test_an_engine_with_room_for_hardly_a_token_rehearses_what_fits(caplog):
    config = SchedulerConfig(page_size=4, max_num_seqs=1, max_num_batched_tokens=8, max_model_len=5)
    engine = EngineCore(ToyRunner("tokens"), EngineConfig(config, num_pages=4))
    with caplog.at_level(logging.WARNING):
        rehearse(engine)
    assert not caplog.records
    assert engine.stats().generated_tokens == 0
