"""The zoo: architectures measured, each in a process of its own, several at a time.

A process per architecture keeps a crash, a runaway loop or a leak of one from the others. They
are forked from a server that has torch and transformers imported already, which saves four
seconds each.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar

from .measure import MeasureExactness, Record


class _Named(Protocol):
    name: str


R = TypeVar("R", bound=_Named)
R_co = TypeVar("R_co", bound=_Named, covariant=True)


class Measure(Protocol[R_co]):
    """What is done to each architecture; it is pickled, and so is what it returns."""

    def __call__(self, name: str) -> R_co: ...

    def failure(self, name: str, cause: str, seconds: float) -> R_co:
        """The result of one whose process ended early, or took too long."""


def run_zoo(
    names: Sequence[str],
    *,
    jobs: int = 2,
    timeout: float = 300.0,
    progress: Callable[[Record, int, int], None] | None = None,
) -> list[Record]:
    """Records of all `names`, in their order; see `run_each`."""
    return run_each(names, MeasureExactness(), jobs=jobs, timeout=timeout, progress=progress)


def run_each(
    names: Sequence[str],
    measure: Measure[R],
    *,
    jobs: int = 2,
    timeout: float = 300.0,
    progress: Callable[[R, int, int], None] | None = None,
) -> list[R]:
    """What `measure` returns for each of `names`, in their order.

    jobs: processes at a time, one thread each. timeout: seconds for one architecture. progress:
    called with each finished result, how many are done, and how many there are.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["autodeploy.zoo.measure"])
    # Asked whether there is a GPU, the server must not open it: no fork could use it then.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    waiting = list(reversed(names))
    running: dict[Connection, _Running] = {}
    done: dict[str, R] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            started = _start(context, measure, waiting.pop())
            running[started.reader] = started
        for result in _finished(running, measure, timeout):
            done[result.name] = result
            if progress is not None:
                progress(result, len(done), len(names))
    return [done[name] for name in names]


@dataclasses.dataclass
class _Running:
    name: str
    process: BaseProcess
    reader: Connection
    since: float


def _start(context: Any, measure: Any, name: str) -> _Running:
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(measure, name, writer), daemon=True)
    process.start()
    writer.close()
    return _Running(name, process, reader, time.monotonic())


def _measure(measure: Any, name: str, writer: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    writer.send(measure(name))


def _finished(running: dict[Connection, _Running], measure: Measure[R], timeout: float) -> list[R]:
    """Those that have ended, by themselves or by the clock; waits at most a second."""
    results = []
    ready = wait(list(running), timeout=1.0)
    for reader in [reader for reader in running if reader in ready]:
        task = running.pop(reader)
        try:
            results.append(task.reader.recv())
            task.process.join()
        except EOFError:
            task.process.join()
            code = task.process.exitcode
            results.append(_failure(measure, task, f"its process ended with status {code}"))
    now = time.monotonic()
    for reader, task in list(running.items()):
        if now - task.since > timeout:
            task.process.kill()
            del running[reader]
            results.append(_failure(measure, task, f"it took more than {timeout:.0f} s"))
    return results


def _failure(measure: Measure[R], task: _Running, cause: str) -> R:
    return measure.failure(task.name, cause, round(time.monotonic() - task.since, 1))
