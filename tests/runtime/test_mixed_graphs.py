"""Steps with prompt tokens, padded as for CUDA graphs, give what they give unpadded."""

import contextlib
import dataclasses
import warnings

import pytest
import torch
from tiny_models import tiny_model
from toy_runner import ToyRunner, contract_of, greedy

from autodeploy.custom_ops import gpu
from autodeploy.custom_ops.cost import Cost
from autodeploy.ladder import build_runner
from autodeploy.runtime import mixed_graphs
from autodeploy.runtime.device_step import DeviceStep
from autodeploy.runtime.engine import EngineConfig, EngineCore
from autodeploy.runtime.host_step import HostStep
from autodeploy.runtime.messages import EngineRequest, one_by_one
from autodeploy.runtime.mixed_graphs import MixedSize, mixed_sizes, useful_tokens
from autodeploy.runtime.packed_runner import PackedRunner
from autodeploy.runtime.sampling_params import SamplingParams
from autodeploy.runtime.scheduler import SchedulerConfig
from autodeploy.transforms.recipe import load_recipe

GROUPS = ("tokens", "window_5", "sequences")
CONFIG = SchedulerConfig(page_size=4, max_num_seqs=5, max_prefill_chunk=11, max_model_len=64)
SIZES = (MixedSize(10, 2), MixedSize(16, 5), MixedSize(40, 5))
PROMPTS = [[3 + n, 2, 5 * n + 7, 9, 4] * (1 + n % 4) for n in range(8)]


class Replayed:
    """What stands in for a CUDA graph on the CPU: the same addresses, run anew."""

    pool = None

    def __init__(self, step, size, pool):
        self.step = step
        step()

    def replay(self):
        self.logits = self.step()


class Told:
    """Changes of block tables, told to the devices' copies of two steps."""

    def __init__(self, *copies):
        self.copies = copies

    def __setitem__(self, place, page):
        for copy in self.copies:
            copy[place] = page


class Both:
    """Each step unpadded with one runner and padded with another, whose caches are its own."""

    def __init__(self, host, device):
        self.host, self.device = host, device

    def forward(self, plan):
        expected, found = self.host.forward(plan), self.device.forward(plan)
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
        return found

    def relay(self, slots, tokens):
        self.host.relay(slots, tokens)
        self.device.relay(slots, tokens)

    def best(self, rows):
        return None  # the sampler's tokens, for both


@pytest.fixture(autouse=True)
def graphs_only_where_they_are_asked_for(request, monkeypatch):
    if "captured" not in request.function.__name__:
        monkeypatch.setattr(mixed_graphs.DecodeGraph, "capture", Replayed)


def engine_of(runner, other, sizes=SIZES):
    """An engine of `runner` whose steps with prompt tokens are padded, beside unpadded ones."""
    engine = EngineCore(runner, EngineConfig(CONFIG, num_pages=70, overlap=True))
    tables, slots = engine._scheduler.tables, CONFIG.max_num_seqs
    groups = [group.name for group in runner.contract.token_groups]
    other.allocate(dict.fromkeys(groups, 70), CONFIG.page_size, slots + 1)
    for cache in runner.caches if isinstance(runner, PackedRunner) else ():
        # What nobody wrote is nothing to read, the page and the slot of padding included.
        cache.fill_(float("nan"))
    device = DeviceStep(runner, tables, slots, (), sizes)
    launched = HostStep(other, tables, slots)
    if runner.contract.device.type != "cpu":
        first = tables.changes
        launched = DeviceStep(other, tables, slots, (), [])
        tables.changes = {name: Told(first[name], tables.changes[name]) for name in first}
    engine._step = Both(launched, device)
    return engine, device.counts


def serve(engine, prompts, count):
    """Greedy tokens; a prompt arrives every other step."""
    tokens = {str(n): [] for n in range(len(prompts))}
    waiting = list(enumerate(prompts))
    step = 0
    while waiting or engine.has_work:
        if waiting and step % 2 == 0:
            n, prompt = waiting.pop(0)
            params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
            engine.add(EngineRequest(request_id=str(n), prompt_token_ids=prompt, params=params))
        for output in one_by_one(engine.step()):
            tokens[output.request_id] += output.token_ids
        step += 1
    return tokens


def test_padding_leaves_every_page_and_state_of_a_sequence_alone():
    engine, counts = engine_of(ToyRunner(*GROUPS), ToyRunner(*GROUPS))
    prompts = [[token % 20 for token in prompt] for prompt in PROMPTS]
    tokens = serve(engine, prompts, 9)
    for n, prompt in enumerate(prompts):
        assert tokens[str(n)] == greedy(prompt, 9, GROUPS)
    assert counts.mixed_replayed > 8
    assert counts.mixed == 0


def test_steps_that_no_graph_has_room_for_are_counted():
    engine, counts = engine_of(ToyRunner(*GROUPS), ToyRunner(*GROUPS), sizes=[MixedSize(10, 2)])
    serve(engine, [[1] * 20, [2] * 3], 4)
    assert counts.mixed >= 1
    assert counts.mixed_replayed >= 1


@pytest.mark.parametrize(
    "name", ["llama", "gemma3_text", "mixtral", "deepseek_v3", "falcon_h1", "qwen3_next"]
)
def test_logits_of_padded_steps_are_those_of_unpadded_ones(name):
    runners = [build_runner(tiny_model(name), load_recipe("default")).runner for _ in range(2)]
    engine, counts = engine_of(*runners)
    prompts = [[token % 256 for token in prompt] for prompt in PROMPTS]
    serve(engine, prompts, 7)
    assert counts.mixed_replayed > 8
    assert counts.mixed == 0


@pytest.mark.skipif(not gpu.interpreted(), reason="checks kernels in the interpreter")
@pytest.mark.parametrize("name", ["gemma3_text", "mixtral", "deepseek_v3", "mamba2"])
def test_kernels_keep_padding_to_itself(name):
    model = tiny_model(name, num_hidden_layers=1) if name != "gemma3_text" else tiny_model(
        name, num_hidden_layers=1, layer_types=["sliding_attention"]
    )  # fmt: skip
    plain = build_runner(model, load_recipe("default")).runner
    with gpu.interpreted_kernels():
        runner = build_runner(model, load_recipe("default")).runner
        assert not runner.contract.eager
        engine, counts = engine_of(runner, plain, sizes=[MixedSize(24, 3)])
        with memory_without_numbers():
            serve(engine, [PROMPTS[2], PROMPTS[1], PROMPTS[0]], 3)
    assert counts.mixed_replayed >= 3


@contextlib.contextmanager
def memory_without_numbers():
    """Tensors made uninitialised are full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_every_step_within_the_bound_has_a_size_close_to_it():
    sizes = mixed_sizes(1024, 256)
    assert len(sizes) == 46
    assert len(mixed_sizes(512, 256)) == 34
    assert all(size.rows < size.tokens for size in sizes)
    for rows in (1, 8, 9, 64, 65, 200, 256):
        for tokens in range(rows + 8, 1025, 7):
            size = min(s for s in sizes if s.tokens >= tokens and s.rows >= rows)
            assert size.tokens - tokens < max(40, size.tokens / 5)


def test_few_sequences_have_one_class_of_rows():
    assert mixed_sizes(100, 4) == [MixedSize(32, 4), MixedSize(64, 4), MixedSize(96, 4)]
    assert mixed_sizes(31, 4) == []


def test_graphs_end_where_the_device_takes_longer_than_the_launches():
    contract = dataclasses.replace(contract_of("tokens"), calls=200)
    large, small = (
        dataclasses.replace(contract, cost=Cost(token_flops=flops))
        for flops in (14 * 10**9, 2 * 10**9)
    )
    assert 512 < useful_tokens(large, 8192) < 700
    assert useful_tokens(small, 8192) == 1024
    assert useful_tokens(small, 300) == 300
    assert useful_tokens(contract, 8192) == 1024, "a cost that nobody knows"


def test_a_program_tells_how_many_calls_it_makes():
    one, three = (
        build_runner(tiny_model("llama", num_hidden_layers=n), load_recipe("default")).runner
        for n in (1, 3)
    )
    of_layer = (three.contract.calls - one.contract.calls) / 2
    assert 4 <= of_layer <= 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "name", ["llama", "gemma3_text", "mixtral", "deepseek_v3", "mamba2", "falcon_h1", "qwen3_next"]
)
def test_captured_steps_give_the_logits_of_launched_ones(name):
    runners = [
        build_runner(tiny_model(name).cuda(), load_recipe("default")).runner for _ in range(2)
    ]
    if runners[0].contract.eager:
        pytest.skip("a step of it is no graph")
    engine, counts = engine_of(*runners)
    serve(engine, [[token % 256 for token in prompt] for prompt in PROMPTS], 7)
    assert counts.mixed_replayed > 8
