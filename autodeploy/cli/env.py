"""`autodeploy env`: what a bug report needs."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from typing import Any

from .. import __version__

_PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "numpy", "sympy", "networkx",
    "omegaconf", "msgspec", "pyzmq", "triton", "flashinfer-python",
)  # fmt: skip


_EXAMPLES = """\
examples:
  autodeploy env
  autodeploy env > environment.txt       # plain text to attach to a report
"""


def add_parser(commands: Any) -> None:
    """Adds `env` to the command line."""
    parser = commands.add_parser(
        "env", help="versions and hardware, to paste into a report", epilog=_EXAMPLES,
        description="Print versions, processor, C compiler, GPUs and the cache folder.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """A table on a terminal; elsewhere one `name: value` line each."""
    facts = environment()
    if sys.stdout.isatty():
        _print_table(facts)
    else:
        for name, value in facts.items():
            print(f"{name}: {value}")
    return 0


def _print_table(facts: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # No frame: what a mouse selects stays text that can be pasted.
    table = Table(box=None, show_header=False)
    for name, value in facts.items():
        table.add_row(Text(name, style="bold"), Text(value))
    Console().print(table)


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
