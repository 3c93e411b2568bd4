import numpy as np
import pytest
import torch
from toy_runner import ToyRunner, greedy

from autodeploy.custom_ops import gpu
from autodeploy.custom_ops.compile_ahead import KernelsAhead
from autodeploy.custom_ops.op import Choice
from autodeploy.custom_ops.sampling import relay_best
from autodeploy.custom_ops.step import open_step, place_pages
from autodeploy.runtime import device_step
from autodeploy.runtime.device_step import DeviceStep
from autodeploy.runtime.engine import EngineConfig, EngineCore
from autodeploy.runtime.graphs import DecodeGraph, default_sizes, graph_sizes
from autodeploy.runtime.mailbox import Mailbox
from autodeploy.runtime.messages import EngineRequest, one_by_one
from autodeploy.runtime.mixed_graphs import MixedSize
from autodeploy.runtime.sampling_params import SamplingParams
from autodeploy.runtime.scheduler import SchedulerConfig
from autodeploy.runtime.staging import RING, Staging

GROUPS = ("tokens", "window_5", "sequences")


class ReplayedStep:
    """What stands in for a CUDA graph on the CPU: the same addresses, run anew."""

    pool = None

    def __init__(self, step, size):
        self.step, self.size = step, size
        step()

    def replay(self):
        self.logits = self.step()


@pytest.fixture
def engine(monkeypatch):
    """An engine whose decoding steps run padded to 2, 4 or 6 sequences."""
    monkeypatch.setattr(
        device_step.DecodeGraph,
        "capture",
        staticmethod(lambda step, size, pool: ReplayedStep(step, size)),
    )
    runner = ToyRunner(*GROUPS)
    scheduler = SchedulerConfig(page_size=4, max_num_seqs=6, max_prefill_chunk=7)
    engine = EngineCore(runner, EngineConfig(scheduler, num_pages=60, overlap=True))
    engine._step = DeviceStep(runner, engine._scheduler.tables, 6, (2, 4, 6))
    return engine


def test_padded_steps_give_the_tokens_of_each_sequence_alone(engine):
    prompts = [[1 + n, 2, 3 * n, 5][: 1 + n % 4] for n in range(9)]
    for n, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0, max_tokens=4 + 3 * n)
        engine.add(EngineRequest(request_id=str(n), prompt_token_ids=prompt, params=params))
    tokens = {str(n): [] for n in range(9)}
    while engine.has_work:
        for output in one_by_one(engine.step()):
            tokens[output.request_id] += output.token_ids
    for n, prompt in enumerate(prompts):
        assert tokens[str(n)] == greedy(prompt, 4 + 3 * n, GROUPS)
    stats = engine.stats()
    assert stats.graph_replays > 20
    assert stats.graph_misses == 0
    assert stats.mixed_steps > 0


def test_the_devices_tables_are_those_of_the_host_after_every_step(engine):
    shared = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    for n in range(12):
        params = SamplingParams(temperature=0, max_tokens=3 + 5 * n % 17)
        prompt = [*shared[: 9 * (n % 2)], n]
        engine.add(EngineRequest(request_id=str(n), prompt_token_ids=prompt, params=params))
    tables = engine._scheduler.tables
    while engine.has_work:
        engine.step()
        for state in engine._scheduler.running:
            for at, (name, table) in enumerate(tables.tables.items()):
                used = slice(tables._first[at][state.slot], tables.columns(state.slot))
                told = engine._step._tables.tensors[name][state.slot, used]
                assert told.tolist() == table[state.slot, used].tolist()
        assert not any(tables.changes.values())
    assert engine.stats().graph_replays > 20


def test_a_captured_step_chooses_tokens_unless_somebody_asks_for_more(engine):
    launch, asked = engine._sampler.launch, []
    engine._sampler.launch = lambda logits, rows: asked.append(len(rows)) or launch(logits, rows)
    for n, temperature in ((0, 0.0), (1, 0.0), (2, 1.0)):
        params = SamplingParams(temperature=temperature, max_tokens=20 - 5 * n)
        engine.add(EngineRequest(request_id=str(n), prompt_token_ids=[n, 2], params=params))
    sampled = []
    while engine.has_work:
        for output in one_by_one(engine.step()):
            sampled += output.token_ids
    assert len(sampled) == 20 + 15 + 10
    # With the third, which draws its tokens, and in no step after it.
    assert asked == [3] * 10
    assert engine.stats().waited_seconds >= 0


@pytest.mark.skipif(not gpu.interpreted(), reason="notes launches of the interpreter")
def test_kernels_of_all_steps_are_compiled_before_the_first_is_captured(engine, monkeypatch):
    happened = []

    def capture(step, size, pool):
        happened.append(size)
        return ReplayedStep(step, size)

    monkeypatch.setattr(DecodeGraph, "capture", staticmethod(capture))
    ahead = KernelsAhead(torch.device("cpu"), happened.append)
    runner, tables = engine._runner, engine._scheduler.tables
    with gpu.interpreted_kernels():
        DeviceStep(runner, tables, 6, (2, 6), [MixedSize(16, 5)], ahead)
    # Not those that come after the toy: it looks at lengths, which nobody has written.
    assert {request.kernel.__name__ for request in happened[0]} == {
        "open_step_kernel", "place_pages_kernel", "resolve_tokens_kernel", "relay_tokens_kernel",
    }  # fmt: skip
    assert happened[1:] == [5, 6, 2]


def test_a_step_runs_padded_to_the_next_captured_size():
    assert graph_sizes([4, 1, 8], 10) == [1, 1, 4, 4, 4, 8, 8, 8, 8, 0, 0]
    assert graph_sizes([], 2) == [0, 0, 0]


def test_sizes_to_capture_end_at_the_most_there_can_be():
    assert default_sizes(1) == [1]
    assert default_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert default_sizes(256)[-1] == 256
    assert default_sizes(600)[-2:] == [576, 600]


def test_what_is_sent_stays_at_its_address_and_is_not_overwritten_under_way():
    staging = Staging({"a": ((3,), np.int32), "b": ((2, 2), np.int64)}, torch.device("cpu"))
    address = staging.tensors["b"].data_ptr()
    rounds = [staging.next() for _ in range(RING + 1)]
    assert rounds[0]["a"] is rounds[RING]["a"]
    assert rounds[0]["a"] is not rounds[1]["a"]
    rounds[-1]["a"][:] = [1, 2, 3]
    rounds[-1]["b"][:] = [[4, 5], [6, 7]]
    staging.send()
    assert staging.tensors["a"].tolist() == [1, 2, 3]
    assert staging.tensors["b"].tolist() == [[4, 5], [6, 7]]
    assert staging.tensors["b"].data_ptr() == address


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_the_host_writes_waits_for_the_copy_of_what_was_there():
    # As the chunks of a long prompt: nobody waits for steps that sample nothing.
    staging = Staging({"x": ((4,), np.int64)}, torch.device("cuda"))
    seen = []
    for step in range(4 * RING):
        torch.cuda._sleep(20_000_000)
        staging.next()["x"][:] = step
        staging.send()
        seen.append(staging.tensors["x"].clone())
    assert [x.tolist() for x in seen] == [[step] * 4 for step in range(4 * RING)]


def test_captured_steps_pass_tokens_on_and_answer_in_pinned_memory():
    # A model whose next token is 3 times the last one, plus the position.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    most, size, vocab = 6, 4, 97
    mailbox = Mailbox(1, most, device)
    newest = torch.zeros(most + 1, dtype=torch.int64, device=device)
    table = torch.zeros((most + 1, 40), dtype=torch.int32, device=device)
    rows = torch.zeros((size, 40), dtype=torch.int32, device=device)
    choice = Choice(device, {})
    opened, placed, best = (
        op.choose(choice).function for op in (open_step, place_pages, relay_best)
    )

    def step():
        ids, positions, _, _, slots, pages = opened(mailbox.letters, mailbox.turn, newest, size)
        placed(table, rows, pages[0], slots, positions, 4)
        following = (3 * ids + positions)[0] % vocab
        logits = -(torch.arange(vocab, device=device) - following[:, None]).abs().float()
        best(logits, slots, mailbox.turn, newest, mailbox.answers)
        return logits

    capture = (
        DecodeGraph.capture if device.type == "cuda" else lambda *args: ReplayedStep(*args[:2])
    )
    graph = capture(step, size, None)
    mailbox.start()
    slots, tokens = np.array([5, 0, 2, 3]), np.array([1, 2, 3, 4])
    found, expected, waiting = [], [], []
    for position in range(20):
        _, letter = mailbox.next()
        letter[0, :size], letter[1, :size], letter[3, :size] = slots, position, 1
        letter[2, :size] = -1 - slots if position else tokens
        letter[4, :size] = slots + 7
        graph.replay()
        mailbox.launched()
        waiting.append(mailbox.answer(np.arange(size)))
        if position:
            # As an engine: while one step runs, the tokens of the one before are read.
            found.append(waiting[-2].result().token_ids.tolist())
        tokens = (3 * tokens + position) % vocab
        expected.append(tokens.tolist())
    found.append(waiting[-1].result().token_ids.tolist())
    assert found == expected
    assert table[slots, :5].tolist() == [[slot + 7] * 5 for slot in slots.tolist()]
    assert rows[:, :5].tolist() == [[slot + 7] * 5 for slot in slots.tolist()]
    assert graph.logits.argmax(-1).tolist() == expected[-1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_reads_what_is_sent_later():
    device = torch.device("cuda")
    staging = Staging({"x": ((4,), np.int64)}, device)
    graph = DecodeGraph.capture(lambda: 2.0 * staging.tensors["x"].float(), 4, None)
    staging.next()["x"][:] = [1, 2, 3, 4]
    staging.send()
    graph.replay()
    assert graph.logits.tolist() == [2.0, 4.0, 6.0, 8.0]
