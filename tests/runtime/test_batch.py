import dataclasses

import numpy as np
import pytest
import torch
from toy_runner import contract_of

from autodeploy.errors import EngineError
from autodeploy.runtime.batch import StepInputs, StepPlan
from autodeploy.runtime.messages import EngineRequest
from autodeploy.runtime.pages import BlockTables
from autodeploy.runtime.request import RequestState
from autodeploy.runtime.sampling_params import SamplingParams

PAGE_SIZE = 4
CONTRACT = contract_of("tokens", "window_5", "sequences")


def state_of(tokens, slot, prompt_logprobs=None):
    params = SamplingParams(prompt_logprobs=prompt_logprobs)
    request = EngineRequest(request_id=f"r{slot}", prompt_token_ids=tokens, params=params)
    state = RequestState(request, slot, row=slot + 10, max_model_len=64)
    state.slot = slot
    return state


def tables():
    pages = {group.name: 30 for group in CONTRACT.token_groups}
    return BlockTables(CONTRACT.token_groups, pages, PAGE_SIZE, num_slots=4, max_model_len=64)


def plan_of(*chunks):
    plan = StepPlan(4)
    plan.clear()
    for state, start, count in chunks:
        plan.add(state, start, count)
    return plan.seal()


def mixed_step():
    """A decode, a prompt's middle and a prompt's end, in slots 2, 0 and 3."""
    chunks = [
        (state_of(list(range(10, 16)), 2), 5, 1),
        (state_of(list(range(30, 50)), 0), 3, 7),
        (state_of(list(range(60, 69)), 3), 4, 5),
    ]
    block_tables = tables()
    for state, start, count in chunks:
        block_tables.slide(state.slot, start)
        block_tables.grow(state.slot, start + count)
    return plan_of(*chunks), block_tables


def test_a_mixed_step_is_staged_by_name():
    plan, block_tables = mixed_step()
    inputs = StepInputs(CONTRACT, block_tables).build(plan)
    assert tuple(inputs) == CONTRACT.metadata
    assert inputs["input_ids"].tolist() == [[15, *range(33, 40), *range(64, 69)]]
    assert inputs["position_ids"].tolist() == [[5, *range(3, 10), *range(4, 9)]]
    assert inputs["cu_q"].tolist() == [0, 1, 8, 13]
    assert inputs["kv_len"].tolist() == [6, 10, 9]
    assert inputs["logit_index"].tolist() == [0, 12]
    assert inputs["state_slot"].tolist() == [2, 0, 3]
    for group in ("tokens", "window_5"):
        table = block_tables.tables[group]
        assert inputs[f"block_table_{group}"].tolist() == table[[2, 0, 3], :3].tolist()
        expected = [
            int(table[slot, position // PAGE_SIZE]) * PAGE_SIZE + position % PAGE_SIZE
            for slot, positions in ((2, [5]), (0, range(3, 10)), (3, range(4, 9)))
            for position in positions
        ]
        assert inputs[f"slot_{group}"].tolist() == expected


def test_dtypes_are_those_of_the_contract():
    plan, block_tables = mixed_step()
    inputs = StepInputs(CONTRACT, block_tables).build(plan)
    short = {name for name, value in inputs.items() if value.dtype == torch.int32}
    assert short == {"cu_q", "kv_len", "block_table_tokens", "block_table_window_5"}
    assert all(value.dtype == torch.int64 for name, value in inputs.items() if name not in short)


def test_only_what_the_program_takes_is_staged():
    plan, block_tables = mixed_step()
    contract = dataclasses.replace(CONTRACT, metadata=("input_ids", "cu_q"))
    assert set(StepInputs(contract, block_tables).build(plan)) == {"input_ids", "cu_q"}


def test_an_unknown_step_input_is_refused_at_once():
    contract = dataclasses.replace(CONTRACT, metadata=("input_ids", "block_table_other"))
    with pytest.raises(EngineError, match="'block_table_other', which the runtime cannot stage"):
        StepInputs(contract, tables())


def test_buffers_serve_steps_of_any_size():
    block_tables = tables()
    staged = StepInputs(CONTRACT, block_tables)
    for tokens in (1, 40, 3, 60, 2):
        state = state_of(list(range(tokens)), 1)
        block_tables.grow(1, tokens)
        inputs = staged.build(plan_of((state, 0, tokens)))
        assert inputs["input_ids"].tolist() == [list(range(tokens))]
        assert inputs["block_table_tokens"].shape == (1, -(-tokens // PAGE_SIZE))
        assert all(value.is_contiguous() for value in inputs.values())
        block_tables.clear(1)


def test_a_step_that_needs_no_logits_asks_for_one_row():
    plan = plan_of((state_of(list(range(20)), 0), 0, 7))
    assert plan.logit_index.tolist() == [6]
    assert plan.sampled_at.tolist() == []


def test_prompt_rows_and_sampled_rows_are_found_in_the_logits():
    scored = state_of(list(range(9)), 0, prompt_logprobs=1)
    plan = plan_of((state_of([1, 2, 3], 1), 2, 1), (scored, 0, 9), (state_of([4, 5], 2), 0, 2))
    assert plan.logit_index.tolist() == [0, *range(1, 10), 11]
    assert plan.sampled_at.tolist() == [0, 9, 10]
    (rows,) = plan.prompt_rows
    assert (rows.position, rows.count) == (0, 8)
    assert plan.logits_at(rows) == slice(1, 9)


def test_prompt_rows_begin_after_those_already_scored():
    scored = state_of(list(range(9)), 0, prompt_logprobs=1)
    scored.prompt_logprobs += [[], [], []]
    plan = plan_of((scored, 1, 5))
    (rows,) = plan.prompt_rows
    assert (rows.position, rows.count) == (3, 3)
    assert plan.logit_index.tolist() == [2, 3, 4]
    assert plan.logits_at(rows) == slice(0, 3)


def test_sequences_side_by_side_are_the_packed_step():
    scored = state_of(list(range(9)), 0, prompt_logprobs=1)
    plan = plan_of((state_of([1, 2, 3], 1), 2, 1), (scored, 2, 4), (state_of([4, 5, 6], 2), 0, 2))
    chunks = list(plan.sequences())
    assert [chunk.request_id for chunk in chunks] == ["r1", "r0", "r2"]
    assert [chunk.token_ids.tolist() for chunk in chunks] == [[1, 2, 3], [*range(6)], [4, 5]]
    assert [(chunk.start, chunk.count) for chunk in chunks] == [(2, 1), (2, 4), (0, 2)]
    packed = np.concatenate(
        [chunk.logit_rows + begin for chunk, begin in zip(chunks, plan.cu_q, strict=False)]
    )
    assert packed.tolist() == plan.logit_index.tolist()
    assert len(chunks[2].logit_rows) == 0
