"""Starting the engines of a server: one, or the replicas of data parallelism."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from ..async_llm import AsyncLLM
from .engine_host import EngineHost
from .placement import replica_options
from .replica import Replica
from .settings import Settings


def start_engines(settings: Settings) -> EngineHost:
    """Builds every replica; blocks until all stand.

    Raises:
        ConfigError: the machine has no room for so many.
        ModelError, EngineError: one of them could not be built.
    """
    options = replica_options(settings.deploy, settings.server.data_parallel_size)
    builds = [partial(AsyncLLM, settings.model, **each) for each in options]
    # The first compiles the model and keeps the program; the others find it made.
    llms = [builds[0]()]
    if len(builds) > 1:
        with ThreadPoolExecutor(len(builds) - 1) as pool:
            llms += pool.map(_run, builds[1:])
    restarts = settings.server.on_engine_death == "restart"
    return EngineHost(
        [Replica(llm, build if restarts else None) for llm, build in zip(llms, builds, strict=True)]
    )


def _run(build: Callable[[], AsyncLLM]) -> AsyncLLM:
    return build()
