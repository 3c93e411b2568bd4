"""The zoo: every architecture measured, each in a process of its own, several at a time.

A process per architecture keeps a crash, a runaway loop or a leak of one from the others. They
are forked from a server that has torch and transformers imported already, which saves four
seconds each.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from .measure import Record

Progress = Callable[[Record, int, int], None]
"""Called with each finished record, how many are done, and how many there are."""


def run_zoo(
    names: Sequence[str], *, jobs: int = 2, timeout: float = 300.0, progress: Progress | None = None
) -> list[Record]:
    """Records of all `names`, in their order.

    jobs: processes at a time, one thread each. timeout: seconds for one architecture.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["autodeploy.zoo.measure"])
    waiting = list(reversed(names))
    running: dict[Connection, _Running] = {}
    done: dict[str, Record] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            started = _start(context, waiting.pop())
            running[started.reader] = started
        for record in _finished(running, timeout):
            done[record.name] = record
            if progress is not None:
                progress(record, len(done), len(names))
    return [done[name] for name in names]


@dataclasses.dataclass
class _Running:
    name: str
    process: BaseProcess
    reader: Connection
    since: float


def _start(context: Any, name: str) -> _Running:
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(name, writer), daemon=True)
    process.start()
    writer.close()
    return _Running(name, process, reader, time.monotonic())


def _measure(name: str, writer: Connection) -> None:
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from .measure import measure_architecture, quiet

    torch.set_num_threads(1)
    quiet()
    writer.send(dataclasses.asdict(measure_architecture(name, CONFIG_MAPPING[name])))


def _finished(running: dict[Connection, _Running], timeout: float) -> list[Record]:
    """Those that have ended, by themselves or by the clock; waits at most a second."""
    records = []
    ready = wait(list(running), timeout=1.0)
    for reader in [reader for reader in running if reader in ready]:
        task = running.pop(reader)
        try:
            records.append(Record(**task.reader.recv()))
            task.process.join()
        except EOFError:
            task.process.join()
            code = task.process.exitcode
            records.append(_failure(task, f"its process ended with status {code}"))
    now = time.monotonic()
    for reader, task in list(running.items()):
        if now - task.since > timeout:
            task.process.kill()
            del running[reader]
            records.append(_failure(task, f"it took more than {timeout:.0f} s"))
    return records


def _failure(task: _Running, cause: str) -> Record:
    seconds = round(time.monotonic() - task.since, 1)
    return Record(task.name, failed=True, cause=cause, seconds=seconds)
