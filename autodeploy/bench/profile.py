"""A chrome trace of steady decode steps, and from it how busy host and GPU are.

Host: time between the ends of two waits less what the host waits in CUDA's synchronise calls, by
the profiler's clock, which is not quite the system's; without a GPU, the whole step. Part of it is
the driver's, which takes the longer to launch a graph the more kernels are in it. GPU busy: the
part of the time in which at least one kernel or copy runs. Profiling slows the host down: its own
time without a profiler is `host_us` of the same row (`latency.py`).
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

_WAITS = frozenset({"cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize"})
_LAUNCH = "cudaGraphLaunch"


class StepProfile:
    """Profiles the first `steps` steps it is told of, once per name.

    file: of the trace; with a second name the name is put before the file's suffix.
    """

    def __init__(self, file: Path, steps: int = 20) -> None:
        self.steps = steps
        self.figures: dict[str, Any] = {}
        """Of the last profile."""
        self._file = file
        self._seen = 0

    @contextmanager
    def of(self, name: str) -> Iterator[Callable[[], None]]:
        """Gives what is to be called after each step; when it ends, `figures` are there."""
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        profiler = profile(activities=activities)
        times: list[float] = []
        self.figures = {}

        def on_step() -> None:
            if not times:
                profiler.start()
            if len(times) <= self.steps:
                times.append(time.perf_counter())
                if len(times) > self.steps:
                    profiler.stop()

        yield on_step
        if 0 < len(times) <= self.steps:
            profiler.stop()
        if len(times) > 1:
            self.figures = _figures(profiler, times)
            profiler.export_chrome_trace(str(self._path(name)))
            print(_text(name, self.figures))

    def _path(self, name: str) -> Path:
        self._seen += 1
        if self._seen == 1:
            return self._file
        return self._file.with_stem(f"{self._file.stem}-{name.replace(' ', '-')}")


def _figures(profiler: profile, times: list[float]) -> dict[str, Any]:
    steps = len(times) - 1
    window = 1e6 * (times[-1] - times[0])
    events = profiler.events() or []
    host, launched = _host(events, steps) or (window, 0.0)
    on_gpu = [e.time_range for e in events if e.device_type == DeviceType.CUDA]
    busy = _union((r.start, r.end) for r in on_gpu)
    return {
        "steps": steps,
        "step_ms": window / steps / 1000,
        "host_ms": host / steps / 1000,
        "launch_ms": launched / steps / 1000,
        "gpu_ms": busy / steps / 1000,
        "gpu_busy": busy / window if on_gpu else None,
        "gpu_kernels": len(on_gpu) / steps,
    }


def _host(events: list[Any], steps: int) -> tuple[float, float] | None:
    """Microseconds in `steps` steps that the host is busy, and those it spends launching graphs."""
    waits = sorted((e.time_range.start, e.time_range.end) for e in events if e.name in _WAITS)
    if len(waits) < 2:
        return None
    begin, end = waits[0][1], waits[-1][1]
    launches = [
        e.time_range.elapsed_us() for e in events
        if e.name == _LAUNCH and begin <= e.time_range.start <= end
    ]  # fmt: skip
    busy = end - begin - sum(stop - start for start, stop in waits[1:])
    seen = len(launches) or steps
    return busy * steps / seen, sum(launches) * steps / seen


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
        f"{figures['host_ms']:.3f} ms ({figures['launch_ms']:.3f} in {_LAUNCH}), GPU busy "
        + ("-" if busy is None else f"{100 * busy:.1f} % in {figures['gpu_kernels']:.0f} kernels")
    )
