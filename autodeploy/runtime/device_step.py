"""DeviceStep: runs a step on an accelerator, if it can as one CUDA graph.

What the host knows of a step is a few numbers per sequence. They are written to pinned memory, and
everything else happens on the device: block tables live there, and so do tokens that were just
sampled. A decoding step of a captured size is one launch (`mailbox.py`): the graph begins by
reading what the host wrote, and ends by choosing the most likely tokens and writing them to where
the next step and the host look for them. Whoever wants others chooses from its logits afterwards.
Steps with prompt tokens go by their number of tokens: a copy and one launch (`mixed_graphs.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from autodeploy.custom_ops.compile_ahead import KernelsAhead
from autodeploy.custom_ops.op import Choice
from autodeploy.custom_ops.sampling import relay_best
from autodeploy.custom_ops.step import open_step, place_pages

from .batch import StepInputs, StepPlan
from .device_tables import DeviceTables
from .graphs import DecodeGraph, graph_sizes
from .letters import LetterWriter
from .mailbox import Mailbox
from .mixed_graphs import MixedGraphs, MixedSize
from .pages import BlockTables
from .relay import TokenRelay
from .runner import ModelRunner
from .sampling import Sampling
from .staging import Staging

_log = logging.getLogger("autodeploy")
_ROWS = "table_rows"


@dataclass
class GraphCounts:
    """Steps by how they ran."""

    replayed: int = 0
    """Decoding steps that were a graph."""
    missed: int = 0
    """Decoding steps that no captured graph has the size for."""
    mixed_replayed: int = 0
    """Steps with prompt tokens that were a graph."""
    mixed: int = 0
    """Steps with prompt tokens that ran without one."""


class DeviceStep:
    """Stages inputs, keeps the device's block tables, and launches.

    Args:
        runner: packed, its caches allocated with one slot more than `num_slots`, for padding.
        num_slots: requests that run at once.
        sizes: numbers of sequences to capture decoding steps for; empty: none.
        mixed_sizes: of steps with prompt tokens to capture; empty: none.
        ahead: compiles kernels of all steps before the first is captured; what was asked of it is
            compiled with them. None makes one.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tables: BlockTables,
        num_slots: int,
        sizes: Sequence[int],
        mixed_sizes: Sequence[MixedSize] = (),
        ahead: KernelsAhead | None = None,
    ) -> None:
        self.counts = GraphCounts()
        self._runner = runner
        self._device = runner.contract.device
        self._num_slots = num_slots
        self._inputs = StepInputs(runner.contract, tables)
        self._page_tables = list(tables.tables.values())
        self._tables = DeviceTables(tables, self._device)
        self._relay = TokenRelay(num_slots, self._device)
        self._mixed: Staging | None = None
        self._mixed_sizes = (0, 0, 0)
        self._graphs: dict[int, DecodeGraph] = {}
        self._size_of = graph_sizes(sizes, num_slots)
        self._mixed_graphs = MixedGraphs(
            runner, self._inputs, self._tables, self._relay, num_slots, mixed_sizes
        )
        self._chose = False
        if sizes:
            self._prepare_graphs(max(sizes))
        self._compile(sizes, KernelsAhead(self._device) if ahead is None else ahead)
        self._mixed_graphs.capture()
        if sizes:
            self._capture(sorted(sizes, reverse=True))

    def forward(self, plan: StepPlan) -> Tensor:
        """Logits [N, vocab], valid until the next call; nothing waits for the device."""
        self._chose = False
        if plan.only_decodes:
            graph = self._graphs.get(self._size_of[len(plan)])
            if graph is not None:
                self.counts.replayed += 1
                self._chose = True
                if plan.new_pages < 0:
                    first = plan.starts % self._inputs.page_size == 0
                    plan.new_pages = int(np.count_nonzero(first))
                self._tables.update(own=plan.new_pages)
                return self._replay(graph, plan)
            self.counts.missed += bool(self._graphs)
            self._tables.update()
            return self._run(plan)
        self._tables.update()
        logits = self._mixed_graphs.launch(plan)
        if logits is None:
            self.counts.mixed += 1
            return self._run(plan)
        self.counts.mixed_replayed += 1
        return logits

    def relay(self, slots: np.ndarray, tokens: Tensor) -> None:
        """The step launched last sampled `tokens` [S] for `slots` [S]."""
        self._relay.write(slots, tokens)

    def best(self, rows: np.ndarray) -> Sampling | None:
        """The most likely tokens of the step launched last, already relayed, if it chose them.

        rows: of the sampler, one for each of its requests.
        """
        return self._mailbox.answer(rows) if self._chose else None

    def _replay(self, graph: DecodeGraph, plan: StepPlan) -> Tensor:
        at, letter = self._mailbox.next()
        self._letters.write(at, letter, plan, graph.size)
        graph.replay()
        self._mailbox.launched()
        return graph.logits[: len(plan)]

    def _prepare_graphs(self, most: int) -> None:
        """What graphs of up to `most` sequences share."""
        choice = Choice(self._device, {})
        self._open = open_step.choose(choice).function
        self._place = place_pages.choose(choice).function
        self._best = relay_best.choose(choice).function
        self._mailbox = Mailbox(len(self._tables.tensors), most, self._device)
        self._letters = LetterWriter(
            self._page_tables, self._inputs.page_size, len(self._mailbox.letters), self._num_slots
        )
        self._counted = torch.arange(most, device=self._device)
        self._bounds = torch.arange(most + 1, dtype=torch.int32, device=self._device)
        # Not of the graphs' pool: what a step leaves unset must be some page, as it is here.
        self._rows = {
            group: torch.zeros((most, table.shape[1]), dtype=torch.int32, device=self._device)
            for group, table in self._tables.tensors.items()
        }

    def _run(self, plan: StepPlan) -> Tensor:
        """Without a graph; any mixture of prompts and decoding sequences."""
        tokens, sequences, rows = plan.num_tokens, len(plan), len(plan.logit_index)
        staging = self._room_for(tokens, sequences, rows)
        arrays = staging.next()
        self._inputs.write(plan, {n: a for n, a in arrays.items() if n != _ROWS})
        arrays[_ROWS][:sequences] = plan.slots
        staging.send()
        inputs = {}
        for name, (shape, _) in self._inputs.shapes(tokens, sequences, rows).items():
            inputs[name] = staging.tensors[name][..., : shape[-1]]
        if plan.unresolved:
            inputs["input_ids"] = self._relay.fill(inputs["input_ids"])
        width = self._inputs.table_width(plan)
        table_rows = staging.tensors[_ROWS][:sequences]
        for name in self._runner.contract.metadata:
            if name.startswith("block_table_"):
                group = name.removeprefix("block_table_")
                inputs[name] = self._tables.rows(group, table_rows, width)
        return self._runner.forward(inputs)

    def _room_for(self, tokens: int, sequences: int, rows: int) -> Staging:
        sizes = (tokens, sequences, rows)
        if self._mixed is None or any(
            n > most for n, most in zip(sizes, self._mixed_sizes, strict=True)
        ):
            # Sizes settle within a few steps; each new one costs a fresh pinned allocation.
            self._mixed_sizes = tuple(  # type: ignore[assignment]
                max(2 * n, most) for n, most in zip(sizes, self._mixed_sizes, strict=True)
            )
            self._mixed = self._staging(*self._mixed_sizes)
        return self._mixed

    def _staging(self, tokens: int, sequences: int, rows: int) -> Staging:
        shapes = self._inputs.shapes(tokens, sequences, rows)
        return Staging({**shapes, _ROWS: ((sequences,), np.int64)}, self._device)

    @torch.inference_mode()
    def _compile(self, sizes: Sequence[int], ahead: KernelsAhead) -> None:
        """All kernels of the steps that will be captured, side by side."""
        for step in self._mixed_graphs.steps():
            ahead.ask(step)
        for size in sizes:
            ahead.ask(partial(self._decode, size))
        ahead.ask(self._relay.warm_up)
        ahead.compile()
        if self._device.type == "cuda":
            self._relay.warm_up()

    @torch.inference_mode()
    def _capture(self, sizes: Sequence[int]) -> None:
        pool = self._mixed_graphs.pool
        self._mailbox.letters.zero_()
        self._mailbox.letters[:, 0] = self._num_slots
        for size in sizes:
            graph = DecodeGraph.capture(partial(self._decode, size), size, pool)
            pool = graph.pool
            self._graphs[size] = graph
        self._mailbox.start()

    def _decode(self, size: int) -> Tensor:
        """What a graph holds: a step of `size` sequences, from a letter to its answer."""
        mailbox, newest = self._mailbox, self._relay.tokens
        ids, positions, known, lengths, slots, pages = self._open(
            mailbox.letters, mailbox.turn, newest, size
        )
        inputs = {
            "input_ids": ids, "position_ids": positions, "known_len": known, "kv_len": lengths,
            "cu_q": self._bounds[: size + 1], "logit_index": self._counted[:size],
            "state_slot": slots,
        }  # fmt: skip
        for own, (group, table) in zip(pages, self._tables.tensors.items(), strict=True):
            rows = self._rows[group][:size]
            places = self._place(table, rows, own, slots, positions, self._inputs.page_size)
            inputs |= {f"block_table_{group}": rows, f"slot_{group}": places}
        wanted = self._runner.contract.metadata
        logits = self._runner.forward({name: inputs[name] for name in wanted})
        self._best(logits, slots, mailbox.turn, newest, mailbox.answers)
        return logits
