"""Plain C kernels, compiled once per machine by its own compiler and called through ctypes.

No torch headers, so a kernel compiles in about half a second. It is linked against the OpenMP
runtime that torch has loaded: a second one would bring a second pool of threads that spin while
the first one works.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

_log = logging.getLogger("autodeploy")

# Sums may be reordered, so that loops vectorise; NaN and infinity keep their meaning.
_FLAGS = (
    "-O3", "-march=native", "-fopenmp", "-fPIC", "-std=c11", "-fno-math-errno",
    "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros", "-ffp-contract=fast",
)  # fmt: skip
_COMPILERS = ("cc", "gcc", "clang")
_HEADER = Path(__file__).with_name("native.h")


class NativeError(Exception):
    """A kernel cannot be compiled or loaded on this machine; the message says what to do."""


class Kernel:
    """One function of a C file. It takes one pointer, to a packed struct, and returns an int.

    One argument on purpose: ctypes converts each at 0.2 us or more, `struct.pack` all thirty of an
    attention call in less than 2 us.
    """

    def __init__(self, source: Path, name: str) -> None:
        self.source, self.name = source, name
        self._function: Any = None

    def __call__(self, arguments: bytes) -> int:
        """Runs the function; compiles it first if it never was.

        Raises:
            NativeError: it cannot be compiled.
        """
        if self._function is None:
            self._function = self._load()
        return self._function(arguments)

    def _load(self) -> Any:
        function = getattr(library(self.source), self.name)
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
        return function

    def ready(self, op: str, instead: str) -> bool:
        """Whether the kernel can run here; if not, says once that `op` runs as `instead`."""
        try:
            library(self.source)
        except NativeError as error:
            _say_once(f"{op} runs as '{instead}', which is slower: {error}")
            return False
        return True


@functools.cache
def _say_once(sentence: str) -> None:
    _log.warning(sentence)


def library(source: Path) -> ctypes.CDLL:
    """The compiled library of a C file, made if it is not there yet. Tried once per process.

    Raises:
        NativeError: there is no compiler, it failed, or the result cannot be kept or loaded.
    """
    outcome = _library(source)
    if isinstance(outcome, NativeError):
        raise outcome
    return outcome


@functools.cache
def _library(source: Path) -> ctypes.CDLL | NativeError:
    failures = []
    for compiler in filter(None, map(shutil.which, _COMPILERS)):
        try:
            path = library_path(source, compiler)
            if not path.is_file():
                _compile(source, compiler, path)
        except NativeError as error:
            failures.append(str(error))
            continue
        except OSError as error:
            return NativeError(
                f"{source.name} cannot be compiled: {error}; set AUTODEPLOY_CACHE to a folder "
                "that can be written"
            )
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            failures.append(
                f"what {compiler} made of {source.name} cannot be loaded: {error}; set "
                "AUTODEPLOY_CACHE to a folder that may hold programs, or install gcc"
            )
    if failures:
        return NativeError(failures[0])
    return NativeError(
        f"there is no C compiler ({', '.join(_COMPILERS)}); install one, such as gcc"
    )


def library_path(source: Path, compiler: str) -> Path:
    """Where the library is kept: named by source, flags, compiler, processor and OpenMP runtime."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    key = hashlib.sha256(source.read_bytes() + _HEADER.read_bytes() + version)
    for part in (*_FLAGS, platform.machine(), _processor(), str(_openmp_runtime())):
        key.update(part.encode())
    return _folder() / f"{source.stem}-{key.hexdigest()[:20]}.so"


def _folder() -> Path:
    chosen = os.environ.get("AUTODEPLOY_CACHE")
    if chosen:
        return Path(chosen) / "native"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "autodeploy" / "native"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return torch.backends.cpu.get_cpu_capability()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@functools.cache
def _openmp_runtime() -> Path | None:
    """The libgomp that torch has loaded into this process, if it is one.

    Other packages bring theirs; torch's own is beside it, in torch/lib or torch.libs.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[5] for line in lines if "libgomp" in line}
    home = str(Path(torch.__file__).parent)
    chosen = min(paths, key=lambda path: (not path.startswith(home), path), default=None)
    return Path(chosen) if chosen else None


def _compile(source: Path, compiler: str, path: Path) -> None:
    """Compiles, then moves into place: another process never loads half a library."""
    runtime = _openmp_runtime()
    link = [str(runtime)] if runtime else ["-fopenmp"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=path.parent) as folder:
        objects, made = Path(folder) / "kernel.o", Path(folder) / path.name
        for command in (
            [compiler, *_FLAGS, f"-I{_HEADER.parent}", "-c", str(source), "-o", str(objects)],
            [compiler, "-shared", str(objects), *link, "-lm", "-o", str(made)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no message"])[0]
                raise NativeError(
                    f"{compiler} failed on {source.name}: {reason}; install a C11 compiler with "
                    "OpenMP, such as gcc 9 or newer"
                )
        made.replace(path)
