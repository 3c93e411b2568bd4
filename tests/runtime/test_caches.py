import dataclasses

import pytest
import torch
from toy_runner import contract_of

from autodeploy.custom_ops.contract import CacheGroup, CacheInput, CacheSpec
from autodeploy.errors import ConfigError, OutOfMemoryError
from autodeploy.runtime.caches import allocate_caches, free_host_memory, plan_caches
from autodeploy.runtime.scheduler import SchedulerConfig

SMALL = SchedulerConfig(max_num_seqs=4, page_size=4, max_num_batched_tokens=8)
TOKEN = 8
"""Bytes per token or per sequence of the toy's caches."""


def test_enough_memory_gives_every_request_its_full_length():
    plan = plan_caches(contract_of("tokens", "window_5"), SMALL, memory_bytes=10**6)
    # A window of 5 tokens and a chunk of 8 lie on at most 5 pages of 4.
    assert plan.num_pages == {"tokens": 1 + 4 * 16, "window_5": 1 + 4 * 5}
    assert plan.max_model_len == 64
    assert plan.bytes == (65 + 21) * 4 * TOKEN


def test_less_memory_is_never_exceeded_and_still_holds_one_sequence():
    contract = contract_of("tokens", "window_5")
    for memory in range(800, 4000, 100):
        plan = plan_caches(contract, SMALL, memory_bytes=memory)
        assert plan.bytes <= memory
        assert plan.max_model_len == 64
        assert plan.num_pages["tokens"] >= 17


def test_the_default_is_a_part_of_the_free_memory():
    config = dataclasses.replace(SMALL, max_num_seqs=10**9)
    plan = plan_caches(contract_of("tokens"), config)
    assert 0 < plan.bytes < free_host_memory()


def test_too_little_memory_shortens_the_context_with_a_warning(caplog):
    plan = plan_caches(contract_of("tokens"), SMALL, memory_bytes=320)
    assert plan.num_pages == {"tokens": 10}
    assert plan.max_model_len == 36
    assert "hold sequences of 36 tokens, fewer than max_model_len=64" in caplog.text
    assert "set kv_cache_memory_bytes to 544 or more" in caplog.text
    enough = plan_caches(contract_of("tokens"), SMALL, memory_bytes=544)
    assert enough.max_model_len == 64


def test_a_context_that_was_asked_for_is_not_shortened():
    config = dataclasses.replace(SMALL, max_model_len=60)
    with pytest.raises(OutOfMemoryError, match="36 tokens, fewer than max_model_len=60"):
        plan_caches(contract_of("tokens"), config, memory_bytes=320)


def test_memory_for_nothing_is_refused():
    with pytest.raises(OutOfMemoryError, match="hold sequences of 0 tokens"):
        plan_caches(contract_of("tokens"), SMALL, memory_bytes=10)
    with pytest.raises(OutOfMemoryError, match="one sequence's recurrent state takes 8 bytes"):
        plan_caches(contract_of("sequences"), SMALL, memory_bytes=7)


def test_states_that_do_not_fit_let_fewer_requests_run(caplog):
    plan = plan_caches(contract_of("sequences"), SMALL, memory_bytes=3 * TOKEN)
    assert (plan.num_slots, plan.num_pages, plan.bytes) == (3, {}, 3 * TOKEN)
    assert "3 run at once" in caplog.text


def test_a_context_beyond_the_model_is_refused():
    config = dataclasses.replace(SMALL, max_model_len=65)
    with pytest.raises(ConfigError, match="beyond the 64 positions"):
        plan_caches(contract_of("tokens"), config, memory_bytes=10**6)


def test_pages_can_be_given_instead_of_memory():
    contract = contract_of("tokens", "window_5")
    assert plan_caches(contract, SMALL, num_pages=9).num_pages == {"tokens": 9, "window_5": 9}
    plan = plan_caches(contract, SMALL, num_pages={"tokens": 9, "window_5": 3})
    assert plan.max_model_len == 32
    # One page, besides the null page, cannot hold a window of 5.
    assert plan_caches(contract_of("window_5"), SMALL, num_pages=2).max_model_len == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_caches_are_zeros_of_the_shape_and_dtype_asked_for(dtype):
    spec = CacheSpec("k_cache", (2, 5), dtype, "token")
    state = CacheSpec("state", (3,), torch.float32, "sequence")
    contract = dataclasses.replace(
        contract_of(),
        groups=(
            CacheGroup("tokens", "token", 0, (CacheInput("k0", spec), CacheInput("k1", spec))),
            CacheGroup("sequences", "sequence", 0, (CacheInput("s0", state),)),
        ),
    )
    caches = allocate_caches(contract, {"tokens": 7}, page_size=4, num_slots=6)
    assert {name: tuple(cache.shape) for name, cache in caches.items()} == {
        "k0": (7, 4, 2, 5),
        "k1": (7, 4, 2, 5),
        "s0": (6, 3),
    }
    assert caches["k0"].dtype == dtype
    for cache in caches.values():
        assert not cache.any()
        assert cache.is_contiguous()
        assert cache.data_ptr() % 64 == 0
        cache.fill_(1)
    assert caches["k0"].data_ptr() != caches["k1"].data_ptr()
