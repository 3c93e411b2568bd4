"""`autodeploy env`: what a bug report needs."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
from typing import Any

from .. import __version__

_PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "numpy", "sympy", "networkx",
    "omegaconf", "msgspec", "pyzmq", "triton", "flashinfer-python",
)  # fmt: skip


def add_parser(commands: Any) -> None:
    """Adds `env` to the command line."""
    parser = commands.add_parser("env", help="versions and hardware, to paste into a report")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """One `name: value` line each."""
    for name, value in environment().items():
        print(f"{name}: {value}")
    return 0


def environment() -> dict[str, str]:
    """Versions of what matters, the processor, the C compiler, GPUs and the cache folder."""
    import torch

    from ..transforms.artifacts import cache_directory

    facts = {
        "autodeploy": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
    }
    facts.update({name: _version(name) for name in _PACKAGES})
    facts["cpu"] = (
        f"{_cpu_name()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} torch threads"
    )
    facts["c compiler"] = _compiler()
    facts["cuda"] = torch.version.cuda or "not in this torch"
    count = torch.cuda.device_count()
    facts["gpus"] = ", ".join(torch.cuda.get_device_name(i) for i in range(count)) or "none"
    facts["cache"] = str(cache_directory())
    return facts


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _compiler() -> str:
    path = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if path is None:
        return "none"
    out = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return out.stdout.splitlines()[0] if out.stdout else path
