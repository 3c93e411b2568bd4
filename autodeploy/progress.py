"""A progress bar on standard error, shown only where somebody can see it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """What a run reports."""

    def tokens(self, count: int) -> None: ...
    def finished(self) -> None: ...


class _Silent:
    def tokens(self, count: int) -> None:
        """Nobody is looking."""

    def finished(self) -> None:
        """Nobody is looking."""


class _Bar:
    def __init__(self, bar: object, task: object) -> None:
        self._bar, self._task = bar, task
        self._started = time.perf_counter()
        self._tokens = 0

    def tokens(self, count: int) -> None:
        self._tokens += count

    def finished(self) -> None:
        rate = self._tokens / max(1e-9, time.perf_counter() - self._started)
        self._bar.update(self._task, advance=1, rate=f"{rate:.0f} tok/s")  # type: ignore[attr-defined]


@contextmanager
def progress_bar(total: int, wanted: bool) -> Iterator[Progress]:
    """A bar over `total` requests with output tokens per second, if wanted and visible."""
    if not wanted or not sys.stderr.isatty():
        yield _Silent()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
    )  # fmt: skip
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Bar(bar, bar.add_task("", total=total, rate=""))
