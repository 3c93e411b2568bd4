"""Compiled artifacts on disk, keyed by everything that decides what they are."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from .graph_text import graph_text
from .program import Program


def cache_directory() -> Path:
    """Where autodeploy keeps what can be made again: AUTODEPLOY_CACHE, or the user's cache."""
    chosen = os.environ.get("AUTODEPLOY_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "autodeploy"


def environment_key() -> str:
    """Versions and hardware an artifact depends on, and the compiler's own sources."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    capability = torch.backends.cpu.get_cpu_capability()
    parts = (
        torch.__version__,
        importlib.metadata.version("transformers"),
        platform.machine(),
        device,
        capability,
    )
    return "|".join([*parts, str(torch.get_num_threads()), _sources()])


def artifact_path(program: Program, backend: str) -> Path:
    """The file for `program` as compiled by `backend`; it need not exist."""
    text = f"{backend}\n{environment_key()}\n{graph_text(program)}"
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    return cache_directory() / "compiled" / f"{digest}.{backend}"


def _sources() -> str:
    """Digest of the transforms and ops: a changed rule must not meet an old artifact."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for folder in ("transforms", "custom_ops"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
