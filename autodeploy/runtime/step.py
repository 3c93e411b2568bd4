"""Step: how planned steps run, which the device and the model decide."""

from __future__ import annotations

import gc
import logging
from typing import Protocol

import numpy as np
from torch import Tensor

from autodeploy.custom_ops.compile_ahead import KernelsAhead

from .batch import StepPlan
from .device_step import DeviceStep
from .engine_config import EngineConfig, mixed_sizes_of
from .graphs import default_sizes
from .host_step import HostStep
from .runner import ModelRunner
from .sampling import Sampling
from .scheduler import Scheduler

logger = logging.getLogger(__name__)


class Step(Protocol):
    """`host_step.HostStep` or `device_step.DeviceStep`."""

    def forward(self, plan: StepPlan) -> Tensor: ...
    def relay(self, slots: np.ndarray, tokens: Tensor) -> None: ...
    def best(self, rows: np.ndarray) -> Sampling | None: ...


def make_step(
    runner: ModelRunner,
    scheduler: Scheduler,
    config: EngineConfig,
    num_slots: int,
    ahead: KernelsAhead,
) -> Step:
    """The one for a runner whose caches are allocated.

    num_slots: of them, without the spare. ahead: compiles what it has been asked for, and what the
    step needs.
    """
    contract, tables = runner.contract, scheduler.tables
    if contract.device.type == "cpu" or runner.needs_requests:
        return HostStep(runner, tables, num_slots)
    sizes = config.graph_sizes
    if sizes is None:
        sizes = tuple(default_sizes(num_slots))
    if contract.eager and sizes:
        logger.warning(
            "steps run without CUDA graphs, which is slow, because the host decides in %s",
            ", ".join(contract.eager),
        )
        sizes = ()
    mixed = mixed_sizes_of(config, scheduler.config, contract) if sizes else []
    step = DeviceStep(runner, tables, num_slots, sizes, mixed, ahead)
    # What is there now stays: the collector need not look at it again, a million objects of
    # torch and of the graph among them, in the middle of a step.
    gc.collect()
    gc.freeze()
    return step
