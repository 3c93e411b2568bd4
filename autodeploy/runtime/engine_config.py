"""EngineConfig: how one engine schedules, and what follows from that for a given model."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from autodeploy.custom_ops.contract import Contract

from .mixed_graphs import MixedSize, mixed_sizes, useful_tokens
from .runner import ModelRunner
from .scheduler import SchedulerConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineConfig:
    """How one engine schedules and what its caches may take."""

    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    kv_cache_memory_bytes: int | None = None
    """For all caches together; None: what a measured step leaves of the GPU, or a quarter of the
    free host memory; less if that is enough for max_num_seqs sequences of max_model_len."""
    gpu_memory_utilization: float = 0.92
    """Fraction of a GPU's memory that weights, steps and caches may take."""
    num_pages: int | Mapping[str, int] | None = None
    """Pages of each cache group, instead of what the memory gives."""
    overlap: bool | None = None
    """Plan a step while the one before runs; None: on an accelerator."""
    graph_sizes: tuple[int, ...] | None = None
    """Numbers of decoding sequences to capture CUDA graphs for; None: `graphs.default_sizes`."""
    mixed_graphs: bool = True
    """Capture steps with prompt tokens too (`mixed_graphs.mixed_sizes`), unless there are to be no
    graphs at all."""


def overlaps(contract: Contract, runner: ModelRunner, config: EngineConfig) -> bool:
    """Whether steps are planned before the tokens of the last are known.

    Not for models whose next step depends on more than that there is a token.
    """
    if runner.needs_requests or contract.lengths is not None:
        return False
    return contract.device.type != "cpu" if config.overlap is None else config.overlap


def within_graph(config: SchedulerConfig, contract: Contract) -> SchedulerConfig:
    """The budget of a step, no larger than the program's graph holds for."""
    limit = contract.max_tokens
    if limit is None or config.max_num_batched_tokens <= limit:
        return config
    logger.warning(
        "the model's graph holds for %d tokens in one step: max_num_batched_tokens=%d is lowered "
        "to that", limit, config.max_num_batched_tokens,
    )  # fmt: skip
    return dataclasses.replace(
        config, max_num_batched_tokens=limit, max_num_seqs=min(config.max_num_seqs, limit)
    )


def mixed_sizes_of(
    config: EngineConfig, scheduler: SchedulerConfig, contract: Contract
) -> list[MixedSize]:
    """Steps with prompt tokens to capture; the scheduler's config is the one within all limits."""
    if not config.mixed_graphs or config.graph_sizes == () or contract.eager:
        return []
    tokens = useful_tokens(contract, scheduler.max_num_batched_tokens)
    return mixed_sizes(tokens, scheduler.max_num_seqs)
