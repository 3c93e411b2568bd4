"""Resident memory of this process, and the part of it that is weights and caches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from ..llm import LLM


def resident_bytes() -> int:
    """Memory of this process that is in RAM now (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS")


def memory_report(llm: LLM) -> dict[str, int]:
    """Bytes resident, and of them weights and cache pages that were ever written.

    On a GPU weights and caches are on the device, whose most bytes ever allocated are `device`;
    caches are whole. Empty if the engine is in another process.
    """
    engine = getattr(llm._executor, "_engine", None)
    if engine is None:
        return {}
    runner = engine._runner
    resident = {"resident": resident_bytes(), "weights": getattr(runner, "weight_bytes", 0)}
    if runner.contract.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(runner.contract.device)
        return {**resident, "caches": engine.cache_bytes, "device": peak}
    touched = _touched_bytes(getattr(runner, "caches", []))
    return {**resident, "caches": min(engine.cache_bytes, touched)}


def _touched_bytes(caches: list[torch.Tensor]) -> int:
    """Bytes of the tensors whose memory pages are in RAM.

    Cache memory is taken from the machine when it is first written; /proc/self/pagemap has a
    64-bit entry per memory page whose top bit says that it is there.
    """
    size = 4096
    touched = 0
    with Path("/proc/self/pagemap").open("rb") as table:
        for cache in caches:
            first = cache.data_ptr() // size
            count = -(-(cache.nbytes + cache.data_ptr() % size) // size)
            table.seek(8 * first)
            entries = np.frombuffer(table.read(8 * count), dtype=np.uint64)
            touched += int((entries >> np.uint64(63)).sum()) * size
    return touched
