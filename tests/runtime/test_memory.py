"""Caches get what a measured step leaves of a device, and a step that large does run."""

import dataclasses

import pytest
import torch
from tiny_models import tiny_model

from autodeploy.errors import OutOfMemoryError
from autodeploy.ladder import build_runner
from autodeploy.runtime.memory import (
    FRAGMENTATION_BYTES,
    NODES_BYTES,
    cache_bytes,
    largest_step,
    measure_activation_bytes,
    memory_for_caches,
    mixed_graphs_bytes,
)
from autodeploy.runtime.mixed_graphs import mixed_sizes
from autodeploy.runtime.scheduler import SchedulerConfig
from autodeploy.transforms.recipe import load_recipe

GIB = 1 << 30
CONFIG = SchedulerConfig(max_num_seqs=5, max_num_batched_tokens=40, page_size=4)


def runner_of(name, **changes):
    return build_runner(tiny_model(name, **changes), load_recipe("default")).runner


def test_weights_others_and_a_step_come_off_what_may_be_used():
    left = cache_bytes(100 * GIB, 70 * GIB, 0.9, activations=5 * GIB, graphs_bytes=GIB)
    assert left == 90 * GIB - 30 * GIB - 6 * GIB - FRAGMENTATION_BYTES


def test_more_than_is_free_is_never_given():
    left = cache_bytes(100 * GIB, 70 * GIB, 1.0, activations=0, graphs_bytes=0)
    assert left == 70 * GIB - FRAGMENTATION_BYTES


def test_a_full_device_is_refused_with_what_to_change():
    with pytest.raises(OutOfMemoryError, match="lower max_num_batched_tokens"):
        cache_bytes(100 * GIB, 12 * GIB, 0.9, activations=GIB)


def test_graphs_of_mixed_steps_have_room_for_the_largest_and_for_their_nodes():
    contract = runner_of("llama").contract
    assert mixed_graphs_bytes(contract, CONFIG, GIB, []) == 0
    few, more = (
        mixed_graphs_bytes(contract, CONFIG, GIB, mixed_sizes(tokens, 5)) for tokens in (32, 40)
    )
    logits = 2 * 5 * contract.vocab_size * 4
    assert few == more == GIB * 32 // 40 + 1 + logits + NODES_BYTES


def test_the_largest_step_has_all_tokens_and_all_sequences():
    contract = runner_of("llama").contract
    inputs = largest_step(contract, CONFIG)
    assert set(inputs) == set(contract.metadata)
    assert inputs["input_ids"].shape == (1, 40)
    assert inputs["cu_q"].tolist() == [0, 36, 37, 38, 39, 40]
    assert inputs["position_ids"][0].tolist() == [*range(36), 0, 0, 0, 0]
    assert inputs["kv_len"].tolist() == [36, 1, 1, 1, 1]


def test_no_sequence_is_longer_than_the_model_or_the_user_allows():
    contract = runner_of("llama").contract
    short = dataclasses.replace(CONFIG, max_model_len=15)
    assert largest_step(contract, short)["kv_len"].tolist() == [15, 15, 8, 1, 1]
    shorter = dataclasses.replace(CONFIG, max_model_len=3)
    assert largest_step(contract, shorter)["kv_len"].tolist() == [3, 3, 3, 3, 3]


@pytest.mark.parametrize("name", ["gemma3_text", "falcon_h1", "minicpm3", "mixtral"])
def test_the_largest_step_runs_over_two_pages_and_one_slot(name):
    runner = runner_of(name)
    assert measure_activation_bytes(runner, CONFIG) > 0


def test_the_host_is_not_measured():
    assert memory_for_caches(runner_of("llama"), CONFIG, 0.9) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_caches_less_than_is_free():
    runner = build_runner(tiny_model("llama").cuda(), load_recipe("default")).runner
    free, _ = torch.cuda.mem_get_info()
    left = memory_for_caches(runner, CONFIG, 0.9)
    assert 0 < left < free
