"""ModelRunner: what the engine needs of a model, however it is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from autodeploy.custom_ops.contract import Contract

from .batch import StepPlan


class ModelRunner(Protocol):
    """A model ready to run steps. All logits are float32.

    A runner whose rows of logits depend on anything but their own sequence is broken: that
    includes NaN in pages and slots that other sequences left behind.
    """

    contract: Contract
    needs_requests: bool
    """True: it runs one sequence at a time and keeps what it needs per request itself."""

    def allocate(self, num_pages: Mapping[str, int], page_size: int, num_slots: int) -> None:
        """Makes the caches, once: pages per group name, the null page included, and slots."""

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits [N, vocab] of the rows in `logit_index`; `inputs` as in `contract.metadata`."""

    def forward_requests(self, plan: StepPlan) -> Tensor:
        """Logits [N, vocab] of `plan.sequences()`, one after the other; if `needs_requests`."""

    def release(self, request_id: str) -> None:
        """The request is over, or begins again; a runner that keeps nothing does nothing."""
