"""CUDA graphs of mixed steps, in which some sequences bring prompt tokens and others decode.

Launched kernel by kernel, such a step takes the host as long as it has kernels: some 8 ms for 32
layers, where the device needs 6 for 160 tokens. No grid depends on lengths, so a graph holds for
every step of at most so many tokens, sequences and rows of logits; what is not there is padding.

    tokens     0 1 2 3 | 4 | 5 6 7 | - -      in the null page, and of no sequence
    sequences  a         b   c       - - -    without tokens, in the spare slot
    logits     3 4 7 - - -                    of token 0, read by nobody

A padded token costs its share of the products, a padded row its share of the head: both are small
while weights are what a step reads. A padded sequence costs each attention launch a block that
ends at once, and takes a long sequence's chance to be cut into ranges: hence few rows for few.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autodeploy.custom_ops.contract import Contract

from .batch import StepInputs, StepPlan
from .device_tables import DeviceTables
from .graphs import DecodeGraph
from .relay import TokenRelay
from .runner import ModelRunner
from .staging import Staging

MOST_TOKENS = 1024
"""A step of more is worth no graph, whatever the model."""
ROWS = (8, 64)
"""Numbers of sequences that have graphs of their own, beside as many as there can be."""
LEAST_PROMPT = 8
"""Tokens more than sequences: a step with as many of both is taken for a decoding one by ops."""
CALL_SECONDS = 40e-6
"""Of the host, for one call of the program's: two or so launches of 15 to 25 us."""
FLOPS = 700e12
"""What large products reach on an H200. Slower devices hide launches behind fewer tokens; there the
largest graphs are of no use, and do no harm."""
SLACK = 1.5
"""The host has more to do than to launch: where both take as long, it is still the slower one."""
_ROWS = "table_rows"


@dataclass(frozen=True, order=True)
class MixedSize:
    """What a graph has room for."""

    tokens: int
    rows: int
    """Sequences, and rows of logits; fewer than tokens."""


def useful_tokens(contract: Contract, most: int) -> int:
    """Tokens, at most `most`, that a device computes while the host launches the step.

    A longer step hides its launches behind the one before it. Where the program's cost is not
    known, `MOST_TOKENS`.
    """
    most = min(most, MOST_TOKENS)
    cost = contract.cost
    if cost is None or not cost.token_flops or not contract.calls:
        return most
    return min(most, int(SLACK * contract.calls * CALL_SECONDS * FLOPS / cost.token_flops))


def mixed_sizes(most_tokens: int, most_rows: int) -> list[MixedSize]:
    """Sizes to capture, ascending: padding is at most 32 tokens, or a fifth of a large step.

    46 for 1024 tokens and 256 rows, 34 for 512.
    """
    tokens = [*range(32, 257, 32), *range(320, 513, 64), *range(640, 1025, 128)]
    return sorted(
        {
            MixedSize(count, min(rows, most_rows, count - LEAST_PROMPT))
            for count in tokens
            if count <= most_tokens
            for rows in (*ROWS, most_rows)
        }
    )


class MixedGraphs:
    """Captures steps of some sizes, and runs a step as the smallest that has room for it.

    Args:
        runner, inputs, tables, relay: those of the other steps.
        num_slots: the slot, and the row of the block tables, of sequences that are not there.
        sizes: to capture, the largest first: the others fit into the memory that it took.
    """

    def __init__(
        self,
        runner: ModelRunner,
        inputs: StepInputs,
        tables: DeviceTables,
        relay: TokenRelay,
        num_slots: int,
        sizes: Iterable[MixedSize],
    ) -> None:
        self._runner = runner
        self._inputs = inputs
        self._tables = tables
        self._relay = relay
        self._num_slots = num_slots
        self._sizes = sorted(sizes)
        self._graphs: dict[MixedSize, tuple[Staging, DecodeGraph]] = {}
        self._staged = [(size, self._padding(size)) for size in reversed(self._sizes)]
        self.pool: Any = None
        """Memory that other graphs may share."""

    def launch(self, plan: StepPlan) -> Tensor | None:
        """Logits [N, vocab] as of `DeviceStep.forward`; None if no graph has room for the step."""
        size = self._room_for(plan.num_tokens, max(len(plan), len(plan.logit_index)))
        if size is None:
            return None
        staging, graph = self._graphs[size]
        self._stage(staging, plan)
        graph.replay()
        return graph.logits[: len(plan.logit_index)]

    def _room_for(self, tokens: int, rows: int) -> MixedSize | None:
        at = bisect_left(self._sizes, MixedSize(tokens, rows))
        return next((size for size in self._sizes[at:] if size.rows >= rows), None)

    def _stage(self, staging: Staging, plan: StepPlan) -> None:
        arrays = staging.next()
        self._inputs.write(plan, {n: a for n, a in arrays.items() if n != _ROWS})
        arrays[_ROWS][: len(plan)] = plan.slots
        pad_mixed(arrays, plan, self._num_slots)
        staging.send()

    def steps(self) -> list[Callable[[], Tensor]]:
        """What will be captured, as functions that run it."""
        return [partial(self._step, staging) for _, staging in self._staged]

    @torch.inference_mode()
    def capture(self) -> None:
        """Makes the graphs; before, no step has one."""
        for (size, staging), step in zip(self._staged, self.steps(), strict=True):
            graph = DecodeGraph.capture(step, size.rows, self.pool)
            self.pool = graph.pool
            self._graphs[size] = staging, graph

    def _padding(self, size: MixedSize) -> Staging:
        """The numbers of a step of this size, all of it padding."""
        shapes = self._inputs.shapes(size.tokens, size.rows, size.rows)
        staging = Staging({**shapes, _ROWS: ((size.rows,), np.int64)}, self._runner.contract.device)
        self._stage(staging, StepPlan(self._num_slots).seal())
        return staging

    def _step(self, staging: Staging) -> Tensor:
        """What a graph holds: the step whose numbers were sent last."""
        inputs = {name: tensor for name, tensor in staging.tensors.items() if name != _ROWS}
        if "input_ids" in inputs:
            inputs["input_ids"] = self._relay.fill(inputs["input_ids"])
        for name in self._runner.contract.metadata:
            if name.startswith("block_table_"):
                group = name.removeprefix("block_table_")
                inputs[name] = self._tables.rows(group, staging.tensors[_ROWS], None)
        return self._runner.forward(inputs)


def pad_mixed(arrays: Mapping[str, np.ndarray], plan: StepPlan, spare: int) -> None:
    """Fills what a step leaves of the arrays of a larger one (see `StepInputs.shapes`).

    spare: the slot and table row of sequences that are not there.
    """
    tokens, sequences = plan.num_tokens, len(plan)
    for name, array in arrays.items():
        if name == "cu_q":
            array[sequences + 1 :] = tokens
        elif name == "kv_len":
            array[sequences:] = 0
        elif name == "logit_index":
            array[len(plan.logit_index) :] = 0
        elif name in ("state_slot", _ROWS):
            array[sequences:] = spare
        else:
            array[..., tokens:] = 1 if name == "known_len" else 0
