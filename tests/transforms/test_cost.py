"""What a program costs, against numbers worked out by hand, and the floors that follow."""

import dataclasses

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import autodeploy.transforms.library  # noqa: F401 - registers the transforms
from autodeploy.bench.shapes import SHAPES
from autodeploy.custom_ops.cost import AttentionCost, Cost, ExpertsCost
from autodeploy.custom_ops.moe import experts
from autodeploy.transforms.capture.export import CaptureOptions, capture
from autodeploy.transforms.cost import (
    Peaks,
    floor_seconds,
    peaks_of,
    prefill_floor_seconds,
    workload_floor_seconds,
)
from autodeploy.transforms.pipeline import run_step
from autodeploy.transforms.program import Fact
from autodeploy.transforms.recipe import load_recipe

H200 = Peaks(4.2e12, 799e12, "known")


def cost_of_model(model):
    program = capture(model, CaptureOptions())
    for step in load_recipe("default").steps:
        run_step(program, step)
        if Fact.CACHED in program.facts:
            break
    return program.contract.cost


def norms(layers, width=64):
    """Elements of two norms a layer and the last one."""
    return (2 * layers + 1) * width


@pytest.mark.parametrize("tied", [False, True])
def test_a_dense_model_costs_its_linears_its_cache_and_its_head_once(tied):
    cost = cost_of_model(tiny_model("llama", tie_word_embeddings=tied))
    # qkv, output, gate and up, down; the head; rotary frequencies.
    linears = 2 * (64 * 128 + 64 * 64 + 64 * 256 + 128 * 64)
    assert cost.weight_bytes == 4 * (linears + 64 * 256 + norms(2) + 8)
    assert cost.token_bytes == 4 * 64
    assert cost.logit_flops == 2 * 64 * 256
    # Beside them, a product that turns positions into angles.
    assert cost.token_flops == 2 * linears + 2 * 8
    keys = AttentionCost(key_bytes=2 * 2 * 2 * 16 * 4, pair_flops=2 * 2 * 4 * (16 + 16))
    assert cost.attention == (keys,)
    assert cost.experts == ()
    assert cost.sequence_bytes == 0


def test_experts_cost_what_tokens_visit():
    cost = cost_of_model(tiny_model("mixtral"))
    attention = 2 * (64 * 128 + 64 * 64)
    router = 2 * 64 * 4
    one = 3 * 64 * 128
    assert cost.experts == (ExpertsCost(expert_bytes=2 * 4 * one, experts=4, chosen=2),)
    assert cost.token_flops == 2 * (attention + router + 2 * 2 * one) + 2 * 8
    assert cost.weight_bytes == 4 * (attention + router + 64 * 256 + norms(2) + 8)


def test_shared_experts_are_read_whole_and_others_by_chance():
    def empty(*shape):
        return torch.empty(shape, device="meta")

    arguments = (empty(5, 8), empty(5, 4), empty(5, 4), empty(12, 12, 8), empty(12, 8, 6))
    one = 4 * (12 * 8 + 8 * 6)
    cost = experts.cost(experts.bind(arguments, {"shared": 2}))
    assert cost.weight_bytes == 2 * one
    assert cost.experts == (ExpertsCost(expert_bytes=one, experts=10, chosen=2),)
    assert cost.token_flops == 2 * 4 * one // 4
    alone = experts.cost(experts.bind(arguments, {}))
    assert alone.weight_bytes == 0
    assert alone.token_flops == cost.token_flops


def test_windows_states_and_latents_are_counted():
    cost = cost_of_model(tiny_model("gemma3_text"))
    each = {a.window: a.key_bytes for a in cost.attention}
    assert each == {5: 2 * 2 * 2 * 16 * 4, 0: 2 * 2 * 16 * 4}
    cost = cost_of_model(tiny_model("deepseek_v3"))
    assert [a.key_bytes for a in cost.attention] == [2 * 24 * 4]
    cost = cost_of_model(tiny_model("mamba2"))
    assert cost.attention == ()
    assert cost.sequence_bytes >= 2 * 2 * 8 * 16 * 16 * 4


def test_a_window_and_a_chunk_bound_the_keys():
    plain, window, chunk = (AttentionCost(1, 1, w, c) for w, c in ((0, 0), (4, 0), (0, 4)))
    assert [a.keys(10) for a in (plain, window, chunk)] == [10, 4, 2.5]
    for attention, seen in (
        (plain, lambda i: i + 1),
        (window, lambda i: min(i + 1, 4)),
        (chunk, lambda i: i % 4 + 1),
    ):
        for length in (1, 3, 4, 5, 10):
            assert attention.pairs(length) == sum(seen(i) for i in range(length))


def test_experts_hit_grow_from_those_of_one_token_to_all():
    experts = ExpertsCost(1, experts=128, chosen=8)
    assert experts.hit(1) == pytest.approx(8)
    assert experts.hit(8) == pytest.approx(128 * (1 - (1 - 8 / 128) ** 8))
    assert experts.hit(10_000) == pytest.approx(128)
    assert ExpertsCost(1, experts=2, chosen=2).hit(1) == 2


def full_cost(name):
    """Of a named shape: one layer, and as many more as it has."""
    fields = dict(SHAPES[name])
    kind, layers = fields.pop("model_type"), fields.pop("num_hidden_layers")
    costs = []
    for count in (1, 2):
        config = AutoConfig.for_model(kind, num_hidden_layers=count, **fields)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        costs.append(cost_of_model(model))
    one, two = costs

    def grown(a, b):
        if isinstance(a, int):
            return a + (layers - 1) * (b - a)
        if isinstance(a, tuple):
            return tuple(map(grown, a, b))
        return dataclasses.replace(
            a, **{f.name: grown(getattr(a, f.name), getattr(b, f.name)) for f in fields_of(a)}
        )

    def fields_of(a):
        kept = ("window", "chunk", "experts", "chosen") if not isinstance(a, Cost) else ()
        return [f for f in dataclasses.fields(a) if f.name not in kept]

    return grown(one, two)


# Milliseconds of a decode step at (batch, kv), and prompt tokens/s of 64 x 1024, on an H200.
FLOORS = {
    "llama-3.1-8b": ({(1, 256): 3.58, (8, 576): 3.72, (64, 576): 4.72, (256, 576): 8.18}, 56_000),
    "llama-3.2-1b": ({(1, 256): 0.59, (8, 576): 0.62, (64, 576): 0.88, (256, 576): 1.74}, 397_000),
    # Of larger batches only the weights: how many keys were counted there is not on record.
    "qwen3-30b-a3b": ({(1, 256): 1.44, (8, 576): 6.2, (64, 1): 14.4}, None),
}


@pytest.mark.parametrize("name", FLOORS)
def test_floors_of_known_shapes_are_those_worked_out_for_the_device(name):
    cost = full_cost(name)
    decode, prefill = FLOORS[name]
    for (batch, kv), milliseconds in decode.items():
        found = 1000 * floor_seconds(cost, batch, kv, H200)
        assert found == pytest.approx(milliseconds, rel=0.03)
    if prefill is not None:
        found = 64 * 1024 / prefill_floor_seconds(cost, [1024] * 64, H200)
        assert found == pytest.approx(prefill, rel=0.03)


def test_a_workload_takes_its_prefill_and_every_decode_step():
    cost = Cost(weight_bytes=1000, token_flops=1, attention=(AttentionCost(10, 0),))
    peaks = Peaks(1.0, 1e9, "known")
    prefill = prefill_floor_seconds(cost, [3, 5], peaks)
    steps = [(4, 6), (5, 7), (8,)]
    decode = sum(1000 + 10 * sum(known) for known in steps)
    assert workload_floor_seconds(cost, [3, 5], [3, 4], 2, peaks) == pytest.approx(prefill + decode)
    alone = [(4,), (5,), (6,), (7,), (8,)]
    decode = sum(1000 + 10 * sum(known) for known in alone)
    assert workload_floor_seconds(cost, [3, 5], [3, 4], 1, peaks) == pytest.approx(prefill + decode)
    assert workload_floor_seconds(cost, [3], [1], 1, peaks) == prefill_floor_seconds(
        cost, [3], peaks
    )


def test_peaks_of_a_device_without_a_name_are_measured():
    peaks = peaks_of(torch.device("cpu"), torch.float32)
    assert peaks.source == "measured"
    assert peaks.bytes_per_second > 0
    assert peaks.flops > 0


def test_code_that_nobody_can_count_has_no_cost():
    program = capture(tiny_model("llama"), CaptureOptions())
    program.module_calls.append(object())
    for step in load_recipe("default").steps:
        run_step(program, step)
        if Fact.CACHED in program.facts:
            break
    assert program.contract.cost is None
