"""Kernels of Triton compiled side by side, before the first launch of any.

A kernel is compiled at its first launch: one after the other, half a second each, on one core. Here
steps are run without launching any kernel of ours, only to find out which there will be:

    ahead = KernelsAhead(device)
    ahead.ask(step)       for every step there will be; notes what it would launch
    ahead.compile()       all of them at once, by a thread for each core
    step()                finds its kernels compiled

Most of a compilation is outside of Python, in MLIR, LLVM and ptxas: of 10 s that eight kernels
took, 1.4 s were Python's. So threads are enough, and what they compile is in this process at once.
They begin when all steps are noted: a step that waits for them after each call of torch is slow.

What a kernel would have written is zeros in such a step, which are safe where they are taken for
places. Nothing may come to depend on them: the host must not look at them, and who asks runs the
step again.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from . import gpu
from .op import function_of

_log = logging.getLogger("autodeploy")
THREADS = "autodeploy-kernels"
"""What names of threads that compile begin with."""
MOST_THREADS = 16
"""More would wait for each other in Python, which is a seventh of the work."""
_UNFILLED = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})


@dataclass(frozen=True)
class Pointer:
    """All that the compiler sees of a tensor: its type, and whether its address is a multiple."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class Tile:
    """All that the compiler sees of a tensor descriptor."""

    base: Pointer
    block_shape: tuple[int, ...]
    padding: str

    @classmethod
    def of(cls, descriptor: Any) -> Tile:
        return cls(_pointer(descriptor.base), tuple(descriptor.block_shape), descriptor.padding)

    def descriptor(self) -> Any:
        """One that a kernel takes, of a tensor of one tile."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        shape = [*self.block_shape]
        strides = [math.prod(shape[at + 1 :]) for at in range(len(shape))]
        return TensorDescriptor(self.base, shape, strides, shape, self.padding)


@dataclass(frozen=True)
class Request:
    """One kernel, as one launch would have it; launches alike in what the compiler sees are one."""

    kernel: Any
    args: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]
    """Arguments by name, and options of the compiler."""

    def call(self, run: Callable[..., Any], **options: Any) -> Any:
        """`run` of the kernel with these arguments."""
        args = (a.descriptor() if isinstance(a, Tile) else a for a in self.args)
        return run(self.kernel, *args, **dict(self.options), **options)

    @classmethod
    def of(cls, kernel: Any, args: Sequence[Any], options: dict[str, Any]) -> Request:
        constants = getattr(kernel, "constexprs", ())
        seen = (a if at in constants else _seen(a) for at, a in enumerate(args))
        return cls(kernel, tuple(seen), tuple((n, _pointer(a)) for n, a in options.items()))


Compile = Callable[[Sequence[Request]], None]


class KernelsAhead:
    """Which kernels steps launch, and all of them compiled.

    Does nothing where kernels are not compiled: on a CPU, without triton, or with one before 3.5.

    Args:
        compile: makes kernels ready, and raises nothing: a launch will raise it again.
    """

    def __init__(self, device: torch.device, compile: Compile | None = None) -> None:
        self._able = compile is not None or _can_compile(device)
        self._compile = compile_side_by_side if compile is None else compile
        self._requests: dict[Request, None] = {}
        self._done: set[Request] = set()
        self._asking = 0.0
        self._failed = False

    def ask(self, step: Callable[[], object]) -> None:
        """Runs `step` without launching kernels of ours, and notes which it would have."""
        if not self._able:
            return
        began = time.perf_counter()
        try:
            with _noted(self._requests), _Zeros():
                step()
        except Exception as error:  # noqa: BLE001 - it runs again, and will raise what matters
            self._say_failed(error)
        self._asking += time.perf_counter() - began

    def _say_failed(self, error: Exception) -> None:
        """Once: what stops one step will stop others like it."""
        _log.debug("a step whose kernels are compiled ahead failed", exc_info=error)
        if not self._failed:
            _log.warning(
                "kernels of a step were not found ahead of it and are compiled at their first "
                "launch, which makes this start longer: %s: %s", type(error).__name__, error,
            )  # fmt: skip
        self._failed = True

    def compile(self) -> None:
        """Makes ready what was asked for since the last time; returns when all is."""
        new = [request for request in self._requests if request not in self._done]
        asking, self._asking = self._asking, 0.0
        if not new:
            return
        began = time.perf_counter()
        self._compile(new)
        self._done.update(new)
        _log.debug(
            "%d kinds of launches were found in %.2f s, their kernels made ready in %.2f s",
            len(new), asking, time.perf_counter() - began,
        )  # fmt: skip


def compile_side_by_side(requests: Sequence[Request]) -> None:
    """Makes kernels ready to launch on the current device, by a thread for each core.

    Compiled, or taken from what Triton keeps on disk; loaded, and with it what launches them, which
    Triton has a C compiler make for each form of arguments.
    """
    from triton import AsyncCompileMode

    run = _launched_kind().run
    # The active mode takes compilations over; it waits for them at its end.
    with _Pool() as pool, AsyncCompileMode(pool, ignore_errors=True) as mode:
        # Long ones first: for what begins last all others wait.
        for request in sorted(requests, key=_length, reverse=True):
            try:
                request.call(run, grid=(1,), warmup=True)
            except Exception as error:  # noqa: BLE001 - its launch will raise it again
                _log.debug("%s is not compiled ahead", _name(request), exc_info=error)
    for future in mode.raw_futures:
        if failed := future.exception():
            _log.debug("a kernel does not compile ahead of its launch", exc_info=failed)


class _Pool(ThreadPoolExecutor):
    """Makes the kernels ready that its calls return."""

    def __init__(self) -> None:
        super().__init__(_threads(), thread_name_prefix=THREADS)
        # Every thread has a current device of its own.
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else -1

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return super().submit(self._ready, partial(fn, *args, **kwargs))

    def _ready(self, compiled: Callable[[], Any]) -> Any:
        kernel = compiled()
        with torch.cuda.device(self._device):
            # To look at it is to load it, as a launch does.
            assert kernel.run is not None
        return kernel


def _can_compile(device: torch.device) -> bool:
    if not gpu.compiles_triton(device):
        return False
    import triton

    if hasattr(triton, "AsyncCompileMode"):
        return True
    _log.info(
        "kernels are compiled one by one, at their first launch, which makes a first start longer: "
        "triton %s cannot compile side by side (3.5 can)", triton.__version__,
    )  # fmt: skip
    return False


def _threads() -> int:
    if hasattr(os, "sched_getaffinity"):
        return min(MOST_THREADS, len(os.sched_getaffinity(0)))
    return min(MOST_THREADS, os.cpu_count() or 1)


def _launched_kind() -> Any:
    """The class of kernels: `run` of it is what every launch comes to."""
    if gpu.interpreted():
        from triton.runtime.interpreter import InterpretedFunction

        return InterpretedFunction
    from triton.runtime.jit import JITFunction

    return JITFunction


@contextlib.contextmanager
def _noted(requests: dict[Request, None]) -> Iterator[None]:
    """Inside, launches of this thread are noted instead."""
    kind, here = _launched_kind(), threading.get_ident()
    launch = kind.run

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if threading.get_ident() != here:
            return launch(kernel, *args, grid=grid, warmup=warmup, **options)
        requests.setdefault(Request.of(kernel, args, options))
        return None

    kind.run = note
    try:
        yield
    finally:
        kind.run = launch


class _Zeros(TorchFunctionMode):
    """Inside, new tensors are zeros, for whoever reads what no kernel has written."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        own = function_of(func)
        if own is not None:
            # The dispatcher would call it with this mode off.
            with self:
                return own(*args, **(kwargs or {}))
        made = func(*args, **(kwargs or {}))
        # An overload's name has the overload's behind a dot.
        if getattr(func, "__name__", "").partition(".")[0] in _UNFILLED:
            made.zero_()
        return made


def _pointer(value: Any) -> Any:
    if type(value) is tuple:
        return tuple(map(_pointer, value))
    if type(value).__name__ == "TensorDescriptor":
        return Tile.of(value)
    return Pointer(value.dtype, value.data_ptr() % 16) if torch.is_tensor(value) else value


def _seen(value: Any) -> Any:
    """What the compiler sees of an argument that is no constant: one number stands for many.

    It knows whether an integer is 1, a multiple of 16, and how many bits it takes.
    """
    if type(value) is int and abs(value) < 1 << 31:
        return value if value in (0, 1) else 16 if value % 16 == 0 else 3
    return _pointer(value)


def _length(request: Request) -> int:
    return len(getattr(request.kernel, "src", ""))


def _name(request: Request) -> str:
    return str(getattr(request.kernel, "__name__", request.kernel))
