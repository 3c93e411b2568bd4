"""PackedRunner: runs a compiled program over all sequences of a step at once, with its caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from autodeploy.custom_ops.contract import Contract

from .batch import StepPlan
from .caches import allocate_caches

StepFunction = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


class PackedRunner:
    """Holds the cache tensors of a compiled program and calls it.

    function: step inputs and caches by name -> logits [N, vocab].
    weight_bytes: of all weights the function reads.
    """

    needs_requests = False

    def __init__(self, function: StepFunction, contract: Contract, weight_bytes: int = 0) -> None:
        self.contract = contract
        self.weight_bytes = weight_bytes
        self._function = function
        self._caches: dict[str, torch.Tensor] = {}

    def allocate(self, num_pages: Mapping[str, int], page_size: int, num_slots: int) -> None:
        """Makes every cache: [pages, page_size, ...] per token, [slots, ...] per sequence."""
        self._caches = allocate_caches(self.contract, num_pages, page_size, num_slots)

    @property
    def caches(self) -> list[torch.Tensor]:
        """Every cache tensor."""
        return list(self._caches.values())

    @torch.inference_mode()
    def forward(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits [N, vocab], in the dtype of the model's head, of the rows of `logit_index`."""
        return self._function({**inputs, **self._caches})

    def forward_requests(self, plan: StepPlan) -> torch.Tensor:
        raise TypeError("this runner takes packed inputs: call forward")

    def release(self, request_id: str) -> None:
        """Nothing: what a finished request wrote is overwritten by the next."""
