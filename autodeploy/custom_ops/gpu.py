"""What implementations in Triton share: where they run, and how a launch overlaps the last one.

Kernels run on CUDA devices. With TRITON_INTERPRET=1 set before the first import of triton they can
be called with tensors of the CPU: slow, but a check without a GPU, which the test suite relies on.
`triton` is imported when the first kernel is launched, never before: a process without a GPU does
not pay for it.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import os
from collections.abc import Iterator

import torch

from .op import OpError

_on_cpu = contextvars.ContextVar("_on_cpu", default=False)


@contextlib.contextmanager
def interpreted_kernels() -> Iterator[None]:
    """Inside, Triton kernels are chosen on the CPU too; TRITON_INTERPRET=1 must be set."""
    if not interpreted():
        raise OpError("set TRITON_INTERPRET=1 before anything imports triton")
    token = _on_cpu.set(True)
    try:
        yield
    finally:
        _on_cpu.reset(token)


def interpreted() -> bool:
    """Whether kernels of Triton run in its interpreter, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def runs_triton(device: torch.device) -> bool:
    """Whether an implementation in Triton is to be chosen for tensors of this device."""
    return has_triton() and (device.type == "cuda" or _on_cpu.get())


def compiles_triton(device: torch.device) -> bool:
    """Whether kernels for tensors of this device are compiled, not interpreted."""
    return device.type == "cuda" and has_triton() and not interpreted()


@functools.cache
def overlaps_launches() -> bool:
    """Whether a kernel may start while its predecessor ends (programmatic dependent launch).

    From compute capability 9.0 on. Such a kernel is launched with `launch_pdl=True` and waits
    (`gdc_wait`) before it reads what its predecessor wrote; weights it may read before.
    """
    return (
        not interpreted()
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= (9, 0)
    )


@functools.cache
def multiprocessors(index: int = 0) -> int:
    """Streaming multiprocessors of a CUDA device; 132, an H200's, where there is none."""
    if not torch.cuda.is_available():
        return 132
    return torch.cuda.get_device_properties(index).multi_processor_count
