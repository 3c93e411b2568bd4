"""How many kernels of Triton became ready while a model was deployed, and how."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from . import gpu
from .compile_ahead import THREADS


@dataclass
class KernelCount:
    """Kernels of ours that became ready: by `KernelsAhead`, and at their first launch.

    kept: of both, which Triton had kept on disk. seconds: of all threads together.
    """

    ahead: int = 0
    later: int = 0
    kept: int = 0
    seconds: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __str__(self) -> str:
        return (
            f"{self.ahead} ahead, {self.later} at their first launch; {self.kept} of them from "
            f"disk, {self.seconds:.1f} s of all threads"
        )

    def listen(self, *, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        """What Triton calls after each compilation."""
        if not getattr(getattr(src, "fn", None), "__module__", "").startswith("autodeploy."):
            return
        ahead = threading.current_thread().name.startswith(THREADS)
        with self._lock:
            self.ahead += ahead
            self.later += not ahead
            self.kept += cache_hit
            self.seconds += times.total / 1e6


@contextlib.contextmanager
def counted_kernels(device: torch.device) -> Iterator[KernelCount | None]:
    """Counts the kernels that become ready inside; None where none is compiled."""
    if not gpu.compiles_triton(device) or importlib.util.find_spec("triton.knobs") is None:
        # Triton tells of its compilations from 3.4 on.
        yield None
        return
    from triton import knobs

    before, count = knobs.compilation.listener, KernelCount()
    knobs.compilation.listener = count.listen
    try:
        yield count
    finally:
        knobs.compilation.listener = before
