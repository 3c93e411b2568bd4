"""Chrome traces of steady decode steps, and from them how busy GPU and host are.

Two traces one after the other. In the first are kernels: GPU busy is the part of the time in which
at least one kernel or copy runs. To have each kernel of a graph told makes launching the graph take
twenty times as long, so the host's steps are in a second trace, without kernels: its time is that
between the ends of two waits for the device, less what it waits; without a GPU, the whole step. It
still has the profiler's own in it: without, it is `host_us` of the same row (`latency.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..runtime.spans import WAIT


class StepProfile:
    """Profiles the first steps it is told of, once per name: `steps` for each of two traces.

    file: of the first trace; with a second name the name is put before the file's suffix. The
    host's has `-host` there as well.
    """

    def __init__(self, file: Path, steps: int = 20) -> None:
        self.steps = steps
        self.figures: dict[str, Any] = {}
        """Of the last profile."""
        self._file = file
        self._seen = 0

    @property
    def wanted(self) -> int:
        """Steps that a run needs to have."""
        return 2 * self.steps + 4

    @contextmanager
    def of(self, name: str) -> Iterator[Callable[[], None]]:
        """Gives what is to be called after each step; when it ends, `figures` are there."""
        self.figures = {}
        path = self._path(name)
        windows = [
            _Window(path, self.steps, kernels=True),
            _Window(path.with_stem(f"{path.stem}-host"), self.steps, kernels=False),
        ]

        def on_step() -> None:
            for window in windows:
                if not window.ended:
                    window.on_step()
                    return

        yield on_step
        for window in windows:
            window.stop()
        kernels, host = windows
        if host.steps:
            self.figures = {**_device_figures(kernels), **_host_figures(host)}
            print(_text(name, self.figures))

    def _path(self, name: str) -> Path:
        self._seen += 1
        if self._seen == 1:
            return self._file
        return self._file.with_stem(f"{self._file.stem}-{name.replace(' ', '-')}")


class _Window:
    """One trace of so many steps, written to `file` when they are over."""

    def __init__(self, file: Path, steps: int, kernels: bool) -> None:
        self._file = file
        activities = [ProfilerActivity.CPU]
        if kernels and torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities)
        self.ended = False
        self.events: list[Any] = []
        self._most = steps
        self._times: list[float] = []

    @property
    def steps(self) -> int:
        return max(0, len(self._times) - 1)

    @property
    def microseconds(self) -> float:
        return 1e6 * (self._times[-1] - self._times[0])

    def on_step(self) -> None:
        if not self._times:
            self._profiler.start()
        self._times.append(time.perf_counter())
        if self.steps == self._most:
            self.stop()

    def stop(self) -> None:
        if self._times and not self.ended:
            self._profiler.stop()
            # Now: when another one has begun, the device's times in this one are zeros.
            self._profiler.export_chrome_trace(str(self._file))
            self.events = list(self._profiler.events() or [])
        self.ended = True


def _device_figures(window: _Window) -> dict[str, Any]:
    on_gpu = [e.time_range for e in window.events if e.device_type == DeviceType.CUDA]
    busy = _union((r.start, r.end) for r in on_gpu)
    return {
        "gpu_ms": busy / window.steps / 1000,
        "gpu_busy": busy / window.microseconds if on_gpu else None,
        "gpu_kernels": len(on_gpu) / window.steps,
    }


def _host_figures(window: _Window) -> dict[str, Any]:
    waits = sorted((e.time_range.start, e.time_range.end) for e in window.events if e.name == WAIT)
    host = window.microseconds / window.steps
    if len(waits) > 1:
        waited = sum(end - start for start, end in waits[1:])
        host = (waits[-1][1] - waits[0][1] - waited) / (len(waits) - 1)
    return {
        "steps": window.steps,
        "step_ms": window.microseconds / window.steps / 1000,
        "host_ms": host / 1000,
    }


def _union(spans: Iterable[tuple[float, float]]) -> float:
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _text(name: str, figures: dict[str, Any]) -> str:
    busy = figures["gpu_busy"]
    return (
        f"profiled {figures['steps']} steps, {name}: {figures['step_ms']:.3f} ms a step, host "
        f"{figures['host_ms']:.3f} ms, GPU busy "
        + ("-" if busy is None else f"{100 * busy:.1f} % in {figures['gpu_kernels']:.0f} kernels")
    )
