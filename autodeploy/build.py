"""From a config to a running engine, in one direction: model -> graph -> plan -> step -> token.

The program of a checkpoint is made in a process of its own and kept, so that the one that serves
holds neither transformers' model classes nor torch.export, nor anything else that only making a
program needs, and so that the next start finds it made.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import nn

from .compile_checkpoint import compile_in_child
from .config import DeployConfig
from .runtime.engine import EngineConfig, EngineCore
from .runtime.scheduler import SchedulerConfig
from .transforms.recipe import Recipe, load_recipe
from .warm_start import KeptProgram


def build_engine(config: DeployConfig) -> EngineCore:
    """Loads, compiles and allocates: everything but the front."""
    recipe = load_recipe(config.recipe, config.overrides)
    runner, summary = _build_runner(config, recipe)
    scheduler = SchedulerConfig(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_prefill_chunk=config.max_prefill_chunk,
        page_size=config.block_size,
        enable_prefix_caching=config.enable_prefix_caching,
        max_model_len=config.max_model_len,
    )
    engine = EngineCore(
        runner,
        EngineConfig(
            scheduler=scheduler,
            kv_cache_memory_bytes=config.kv_cache_memory_bytes,
            num_pages=config.num_pages,
            overlap=config.async_scheduling,
            graph_sizes=_graph_sizes(config),
        ),
    )
    contract = runner.contract
    dtype = str(contract.dtype).removeprefix("torch.")
    engine.summary = {**summary, "device": str(contract.device), "dtype": dtype}
    return engine


def _graph_sizes(config: DeployConfig) -> tuple[int, ...] | None:
    if config.enforce_eager:
        return ()
    return None if config.cuda_graph_sizes is None else tuple(config.cuda_graph_sizes)


def _build_runner(config: DeployConfig, recipe: Recipe) -> tuple[Any, dict[str, str]]:
    started = time.perf_counter()
    kept = KeptProgram.of(config, recipe)
    start = "warm"
    if kept is not None and not kept.exists and not kept.refused:
        start = "cold"
        why = compile_in_child(config, recipe)
        if why is not None:
            kept.refuse(why)
    if kept is not None and kept.exists:
        runner, facts = kept.restore()
        return runner, {**facts, "start": f"{start}, {time.perf_counter() - started:.2f} s"}
    # Heavy imports: a warm start must not pay for them.
    from .ladder import build_runner, summary

    live = isinstance(config.model, nn.Module)
    if live:
        model = config.model
    else:
        from .checkpoint import load_model

        model = load_model(config.model, config.dtype, config.device, config.trust_remote_code)
    built = build_runner(
        model,
        recipe,
        owned=not live,
        verify=config.verify,
        dump_graphs=Path(config.dump_graphs) if config.dump_graphs else None,
    )
    return built.runner, {**summary(built), "start": "cold"}
