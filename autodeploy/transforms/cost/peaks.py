"""Peaks: how fast a device moves and computes at best; known for some, measured for the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_KNOWN = {
    # Measured: a read of much memory, and an 8192 x 8192 x 8192 bfloat16 product.
    ("NVIDIA H200", torch.bfloat16): (4.2e12, 799e12),
    ("NVIDIA H200", torch.float16): (4.2e12, 799e12),
}
_TRIES = 5


@dataclass(frozen=True)
class Peaks:
    """Ceilings of one device for one dtype."""

    bytes_per_second: float
    flops: float
    """Floating-point operations a second, in matrix products."""
    source: str
    """known or measured"""


def peaks_of(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Known ceilings by the device's name, or else those of a short copy and a short product."""
    if device.type == "cuda":
        known = _KNOWN.get((torch.cuda.get_device_name(device), dtype))
        if known is not None:
            return Peaks(*known, "known")
    return _measured(device, dtype)


def _measured(device: torch.device, dtype: torch.dtype) -> Peaks:
    on_gpu = device.type == "cuda"
    words, width = (2**28, 4096) if on_gpu else (2**24, 512)
    source = torch.ones(words, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    factor = torch.ones(width, width, dtype=dtype, device=device)
    copy = _best_seconds(lambda: target.copy_(source), device)
    product = _best_seconds(lambda: factor @ factor, device)
    return Peaks(2 * source.nbytes / copy, 2 * width**3 / product, "measured")


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    best = float("inf")
    for _ in range(_TRIES):
        settle()
        started = time.perf_counter()
        work()
        settle()
        best = min(best, time.perf_counter() - started)
    return best
