"""Requests of models whose keys depend on the prompt's length: what is staged, shared, redone."""

import dataclasses

import pytest
from toy_runner import contract_of

from autodeploy.custom_ops.contract import LengthRule
from autodeploy.runtime.batch import StepInputs
from autodeploy.runtime.messages import EngineRequest
from autodeploy.runtime.request import RequestState
from autodeploy.runtime.sampling_params import SamplingParams
from autodeploy.runtime.scheduler import Scheduler, SchedulerConfig

PLAIN = contract_of("tokens")
STEP = LengthRule(steps=(8,), recompute_past=8)
GROWING = LengthRule(grows_past=8)


def scheduler(rule):
    contract = dataclasses.replace(PLAIN, metadata=(*PLAIN.metadata, "known_len"), lengths=rule)
    config = SchedulerConfig(max_num_seqs=4, page_size=4, max_prefill_chunk=5)
    made = Scheduler(config, contract, {"tokens": 40}, max_model_len=64)
    return made, StepInputs(contract, made.tables)


def request(rule, prompt, arrival=0, prefilled=None):
    return RequestState(
        EngineRequest(
            request_id=str(arrival), prompt_token_ids=list(prompt), prefilled=prefilled,
            params=SamplingParams(max_tokens=20),
        ),
        arrival, row=arrival, max_model_len=64, lengths=rule,
    )  # fmt: skip


def run(made, inputs):
    """One step; gives the lengths that were staged."""
    plan = made.schedule()
    found = inputs.build(plan)["known_len"]
    made.advance(plan)
    made.publish(plan)
    for state, samples in zip(plan.requests, plan.samples, strict=True):
        if samples:
            state.append(1)
    return found.tolist()[0]


def test_a_prompt_in_chunks_has_its_whole_length_and_later_tokens_their_own():
    made, inputs = scheduler(GROWING)
    made.add(request(GROWING, range(12)))
    assert [run(made, inputs) for _ in range(5)] == [[12] * 5, [12] * 5, [12] * 2, [13], [14]]


def test_a_beam_keeps_the_length_of_the_prompt_it_grew_from():
    made, inputs = scheduler(GROWING)
    made.add(request(GROWING, range(12), prefilled=10))
    assert [run(made, inputs) for _ in range(3)] == [[10] * 5, [10] * 5, [11, 12]]


@pytest.mark.parametrize(
    ("rule", "first", "second", "shared"),
    [
        (None, 12, 20, 12), (GROWING, 12, 12, 8), (GROWING, 12, 20, 0), (GROWING, 6, 7, 4),
        (STEP, 12, 20, 12), (STEP, 7, 20, 0),
    ],
)  # fmt: skip
def test_prompts_share_pages_only_if_their_lengths_are_alike(rule, first, second, shared):
    made, inputs = scheduler(rule)
    one = request(rule, range(first))
    made.add(one)
    while one.computed < first:
        run(made, inputs)
    made.finish(one)
    two = request(rule, range(second), arrival=1)
    made.add(two)
    run(made, inputs)
    assert two.metrics.cached_tokens == shared


def test_a_sequence_that_crosses_is_computed_anew_once():
    made, inputs = scheduler(STEP)
    state = request(STEP, range(7))
    made.add(state)
    lengths = []
    restarts = []
    for _ in range(8):
        lengths.append(run(made, inputs))
        if state.starts_again():
            restarts.append(state.known)
            made.restart(state)
            assert (state.computed, state.slot, made.tables.used) == (0, -1, 0)
    # 7 and 1 tokens as they came; then all 9 in chunks as if they were a prompt.
    assert lengths[:5] == [[1, 2, 3, 4, 5], [6, 7], [8], [9] * 5, [9] * 4]
    assert lengths[5:] == [[10], [11], [12]]
    assert restarts == [9]
    assert (made.preemptions, state.prefilled) == (0, 9)


def test_without_a_rule_nothing_starts_again():
    state = request(None, range(7))
    state.append(1)
    assert not state.starts_again()
    assert state.key_length == 1
