"""DeviceStep: runs a step on an accelerator, if it can as one CUDA graph.

What the host knows of a step is a few numbers per sequence. They are written to pinned memory,
sent in one copy, and everything else happens on the device: block tables live there, and so do
tokens that were just sampled. A step of a captured size is that copy and one launch: decoding
steps go by their number of sequences (`graphs.py`), others by that of tokens (`mixed_graphs.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .batch import StepInputs, StepPlan
from .device_tables import DeviceTables
from .graphs import DecodeGraph, graph_sizes
from .mixed_graphs import MixedGraphs, MixedSize
from .pages import BlockTables
from .relay import TokenRelay
from .runner import ModelRunner
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
    """

    def __init__(
        self,
        runner: ModelRunner,
        tables: BlockTables,
        num_slots: int,
        sizes: Sequence[int],
        mixed_sizes: Sequence[MixedSize] = (),
    ) -> None:
        self.counts = GraphCounts()
        self._runner = runner
        self._device = runner.contract.device
        self._num_slots = num_slots
        self._inputs = StepInputs(runner.contract, tables)
        self._tables = DeviceTables(tables, self._device)
        self._relay = TokenRelay(num_slots, self._device)
        self._mixed: Staging | None = None
        self._mixed_sizes = (0, 0, 0)
        self._graphs: dict[int, DecodeGraph] = {}
        self._size_of = graph_sizes(sizes, num_slots)
        self._mixed_graphs = MixedGraphs(
            runner, self._inputs, self._tables, self._relay, num_slots, mixed_sizes
        )
        if sizes:
            self._capture(sorted(sizes, reverse=True))

    def forward(self, plan: StepPlan) -> Tensor:
        """Logits [N, vocab], valid until the next call; nothing waits for the device."""
        self._tables.update()
        if plan.only_decodes:
            graph = self._graphs.get(self._size_of[len(plan)])
            if graph is not None:
                self.counts.replayed += 1
                return self._replay(graph, plan)
            self.counts.missed += bool(self._graphs)
        else:
            logits = self._mixed_graphs.launch(plan)
            if logits is not None:
                self.counts.mixed_replayed += 1
                return logits
            self.counts.mixed += 1
        return self._run(plan)

    def relay(self, slots: np.ndarray, tokens: Tensor) -> None:
        """The step launched last sampled `tokens` [S] for `slots` [S]."""
        self._relay.write(slots, tokens)

    def _replay(self, graph: DecodeGraph, plan: StepPlan) -> Tensor:
        arrays = graph.staging.next()
        self._inputs.write(plan, {n: a for n, a in arrays.items() if n != _ROWS})
        arrays[_ROWS][: len(plan)] = plan.slots
        self._pad(arrays, len(plan), graph.size)
        graph.staging.send()
        graph.replay()
        return graph.logits[: len(plan)]

    def _pad(self, arrays: dict[str, np.ndarray], used: int, size: int) -> None:
        """Sequences that are not there: one token each, in the null page and the spare slot."""
        if used == size:
            return
        for name, array in arrays.items():
            if name == "cu_q":
                array[used + 1 :] = np.arange(used + 1, size + 1)
            elif name == "logit_index":
                array[used:] = np.arange(used, size)
            elif name in ("state_slot", _ROWS):
                array[used:] = self._num_slots
            else:
                array[..., used:] = 1 if name in ("kv_len", "known_len") else 0

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
        return self._call(inputs, staging.tensors[_ROWS][:sequences], width)

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

    def _call(self, inputs: dict[str, Tensor], table_rows: Tensor, width: int | None) -> Tensor:
        for name in self._runner.contract.metadata:
            if name.startswith("block_table_"):
                group = name.removeprefix("block_table_")
                inputs[name] = self._tables.rows(group, table_rows, width)
        return self._runner.forward(inputs)

    @torch.inference_mode()
    def _capture(self, sizes: Sequence[int]) -> None:
        logits: Tensor | None = None
        pool = self._mixed_graphs.pool
        for size in sizes:
            staging = self._staging(size, size, size)
            arrays = staging.next()
            self._pad_all(arrays, size)
            staging.send()

            def step(staging: Staging = staging) -> Tensor:
                given = {n: t for n, t in staging.tensors.items() if n != _ROWS}
                if "input_ids" in given:
                    given["input_ids"] = self._relay.fill(given["input_ids"])
                return self._call(given, staging.tensors[_ROWS], None)

            if logits is None:
                first = step()
                logits = torch.empty_like(first)
                del first
            graph = DecodeGraph.capture(step, size, staging, logits[:size], pool)
            pool = graph.pool
            self._graphs[size] = graph

    def _pad_all(self, arrays: dict[str, np.ndarray], size: int) -> None:
        if "cu_q" in arrays:
            arrays["cu_q"][0] = 0
        self._pad(arrays, 0, size)
