"""From a config to a running engine, in one direction: model -> graph -> plan -> step -> token.

On the CPU, the program of a checkpoint is made in a process of its own and kept, so that the one
that serves holds neither transformers' model classes nor torch.export, nor anything else that only
making a program needs. On a GPU that memory is not what is short: the program is made here, from
weights that are loaded once. Either way the next start finds it made.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .compile_checkpoint import compile_in_child
from .config import DeployConfig
from .custom_ops.kernel_count import counted_kernels
from .errors import UnsupportedModelError
from .runtime.engine import EngineConfig, EngineCore
from .runtime.grammars import Grammars, grammars_of
from .runtime.rehearsal import rehearse
from .runtime.scheduler import SchedulerConfig
from .transforms.recipe import Recipe
from .warm_start import KeptProgram

_log = logging.getLogger("autodeploy")
TOKENS_PER_STEP = {"cuda": 8192}
"""Budget of a step by kind of device, if the user gives none: enough to fill a GPU."""
TOKENS_PER_STEP_ELSEWHERE = 2048
BLOCK_SIZE = 16


class Phases:
    """Wall time of the phases of a start, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - started

    @property
    def total(self) -> float:
        return time.perf_counter() - self._started

    def facts(self) -> dict[str, str]:
        """As text, the total last."""
        return {
            f"{n} seconds": f"{s:.2f}" for n, s in {**self.seconds, "total": self.total}.items()
        }


def build_engine(config: DeployConfig) -> EngineCore:
    """Loads, compiles and allocates: everything but the front."""
    _take_place(config)
    phases = Phases()
    recipe = config.resolved_recipe()
    runner, summary = _build_runner(config, recipe, phases)
    embeds = config.task == "embed"
    if embeds and runner.contract.hidden is None:
        raise UnsupportedModelError(
            f"only a model that runs packed and cached can embed, and this one does not: "
            f"{summary.get('cause', 'its rung is ' + summary['rung'])}"
        )
    device = runner.contract.device
    with counted_kernels(device) as kernels:
        with phases.timed("memory"):
            engine = EngineCore(
                runner,
                EngineConfig(
                    scheduler=_scheduler_config(config, device),
                    kv_cache_memory_bytes=config.kv_cache_memory_bytes,
                    gpu_memory_utilization=config.gpu_memory_utilization,
                    num_pages=config.num_pages,
                    # A prompt is one step, or a few; there is nothing to plan ahead of.
                    overlap=False if embeds else config.async_scheduling,
                    graph_sizes=_graph_sizes(config),
                    mixed_graphs=config.cudagraph_mode == "full",
                ),
                grammars=partial(_grammars, config, runner.contract.vocab_size),
            )
        if device.type == "cuda" and not embeds:
            with phases.timed("rehearsal"):
                rehearse(engine)
    # Those of a kept program speak of the start that made it.
    engine.summary = {n: f for n, f in summary.items() if not n.endswith(" seconds")}
    contract = runner.contract
    dtype = str(contract.dtype).removeprefix("torch.")
    engine.summary |= {"device": str(contract.device), "dtype": dtype, **phases.facts()}
    if kernels is not None:
        engine.summary["kernels"] = str(kernels)
    if "recipe" in engine.summary:
        # A program made in another process knows its recipe as a dict, which has no name.
        engine.summary["recipe"] = recipe.name
    times = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in phases.seconds.items())
    _log.info("ready in %.1f s (%s)", phases.total, times)
    return engine


def _take_place(config: DeployConfig) -> None:
    """Keeps this process to its part of the machine; before CUDA is set up."""
    if config.visible_devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = config.visible_devices
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)


def _grammars(config: DeployConfig, vocab_size: int) -> Grammars:
    """Of the tokenizer and the ends of sequence that the front takes from the same config."""
    from .generation_defaults import defaults_of
    from .llm import resolve_tokenizer

    tokenizer = resolve_tokenizer(config)
    defaults = defaults_of(config.model, tokenizer, config.trust_remote_code)
    return grammars_of(tokenizer, vocab_size, defaults.eos_token_ids)


def _graph_sizes(config: DeployConfig) -> tuple[int, ...] | None:
    if config.enforce_eager or config.task == "embed":
        return ()
    return None if config.cuda_graph_sizes is None else tuple(config.cuda_graph_sizes)


def _scheduler_config(config: DeployConfig, device: torch.device) -> SchedulerConfig:
    tokens = TOKENS_PER_STEP.get(device.type, TOKENS_PER_STEP_ELSEWHERE)
    return SchedulerConfig(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens or tokens,
        max_prefill_chunk=config.max_prefill_chunk,
        page_size=config.block_size or BLOCK_SIZE,
        enable_prefix_caching=config.enable_prefix_caching,
        max_model_len=config.max_model_len,
    )


def _build_runner(
    config: DeployConfig, recipe: Recipe, phases: Phases
) -> tuple[Any, dict[str, str]]:
    kept = KeptProgram.of(config, recipe)
    start = "warm"
    if kept is not None and not kept.exists and not kept.refused:
        start = "cold"
        if _compiles_elsewhere(config):
            with phases.timed("compile process"):
                why = compile_in_child(config, recipe)
            if why is not None:
                kept.refuse(why)
    if kept is not None and kept.exists:
        with phases.timed("load"):
            runner, facts = kept.restore()
        return runner, {**facts, "start": f"{start}, {phases.total:.2f} s"}
    with phases.timed("import"):
        # Heavy: a warm start must not pay for them.
        from .ladder import build_runner, summary

    live = isinstance(config.model, nn.Module)
    if live:
        model = config.model
    else:
        from .checkpoint import load_model

        with phases.timed("load"):
            model = load_model(
                config.model,
                config.dtype,
                config.device,
                config.trust_remote_code,
                config.load_format,
            )
    built = build_runner(
        model,
        recipe,
        owned=not live,
        verify=config.verify,
        dump_graphs=Path(config.dump_graphs) if config.dump_graphs else None,
    )
    phases.seconds |= built.seconds
    facts = summary(built)
    if kept is not None and not kept.refused and built.program is not None:
        with phases.timed("keep"):
            why = kept.keep(built.program, facts)
        if why is not None:
            kept.refuse(why)
    return built.runner, {**facts, "start": "cold"}


def _compiles_elsewhere(config: DeployConfig) -> bool:
    from .checkpoint import device_of

    return device_of(config.device).type == "cpu"
