"""Where the engine runs: in this process, or in a worker process."""

from __future__ import annotations

from .base import BuildEngine, Executor, dead_error
from .in_process import InProcessExecutor
from .worker import WorkerExecutor

__all__ = [
    "BuildEngine",
    "Executor",
    "InProcessExecutor",
    "WorkerExecutor",
    "dead_error",
    "start_executor",
]

_KINDS: dict[str, type[InProcessExecutor] | type[WorkerExecutor]] = {
    "inprocess": InProcessExecutor,
    "process": WorkerExecutor,
}


def start_executor(kind: str, build: BuildEngine) -> Executor:
    """Builds an engine in an executor of the given kind: inprocess or process."""
    return _KINDS[kind](build)
