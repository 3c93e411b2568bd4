"""Plain C kernels, compiled once per machine by its own compiler and called through ctypes.

No torch headers, so a kernel compiles in about a second. It is linked against the OpenMP runtime
that torch has loaded: a second one would bring a second pool of threads that spin while the
first one works.
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

import torch

_log = logging.getLogger("autodeploy")

# Sums may be reordered, so that loops vectorise; NaN and infinity keep their meaning.
_FLAGS = (
    "-O3", "-march=native", "-fopenmp", "-fPIC", "-std=c11", "-fno-math-errno",
    "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros", "-ffp-contract=fast",
)  # fmt: skip


@functools.cache
def load(source: Path) -> ctypes.CDLL | None:
    """The compiled library of a C file; None if this machine cannot make it, which is logged."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        _refuse(source, "there is no C compiler; install gcc or clang")
        return None
    path = _library_path(source, compiler)
    if not path.is_file():
        problem = _compile(source, compiler, path)
        if problem is not None:
            _refuse(source, problem)
            return None
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        _refuse(source, f"the compiled library cannot be loaded: {error}")
        return None


def _refuse(source: Path, why: str) -> None:
    _log.warning("%s runs as plain torch operations, which is slower: %s", source.stem, why)


def _library_path(source: Path, compiler: str) -> Path:
    """Keyed by the source, the flags, the compiler and the processor they are for."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    key = hashlib.sha256(source.read_bytes() + version)
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
    """The libgomp that torch has loaded into this process, if it is one."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[5] for line in lines if "libgomp" in line}
    return Path(sorted(paths)[0]) if paths else None


def _compile(source: Path, compiler: str, path: Path) -> str | None:
    """Compiles and moves into place; returns what went wrong, if anything."""
    runtime = _openmp_runtime()
    with tempfile.TemporaryDirectory(prefix="autodeploy-cc-") as folder:
        objects, library = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        link = [str(runtime)] if runtime else ["-fopenmp"]
        for command in (
            [compiler, *_FLAGS, "-c", str(source), "-o", str(objects)],
            [compiler, "-shared", str(objects), *link, "-lm", "-o", str(library)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["no message"]
                return f"{Path(compiler).name} failed: {lines[-1]}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(f".{os.getpid()}.tmp")
            shutil.copy(library, unfinished)
            unfinished.replace(path)
        except OSError as error:
            return f"'{path.parent}' cannot be written: {error}"
    return None
