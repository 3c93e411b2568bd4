"""HostStep: runs a step on the CPU, or on a model that takes one sequence at a time."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .batch import StepInputs, StepPlan
from .pages import BlockTables
from .relay import TokenRelay
from .runner import ModelRunner
from .sampling import Sampling


class HostStep:
    """Builds every step's inputs anew and hands them to the runner."""

    def __init__(self, runner: ModelRunner, tables: BlockTables, num_slots: int) -> None:
        self._runner = runner
        self._inputs = StepInputs(runner.contract, tables)
        self._relay = TokenRelay(num_slots, runner.contract.device)

    def forward(self, plan: StepPlan) -> Tensor:
        """Logits [N, vocab]."""
        if self._runner.needs_requests:
            return self._runner.forward_requests(plan)
        inputs = self._inputs.build(plan)
        if plan.unresolved:
            inputs["input_ids"] = self._relay.fill(inputs["input_ids"])
        return self._runner.forward(inputs)

    def relay(self, slots: np.ndarray, tokens: Tensor) -> None:
        """The step launched last sampled `tokens` [S] for `slots` [S]."""
        self._relay.write(slots, tokens)

    def best(self, rows: np.ndarray) -> Sampling | None:
        """None: choosing tokens is left to the sampler."""
        return None
