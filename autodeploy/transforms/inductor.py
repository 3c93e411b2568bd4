"""What Inductor makes of a graph, kept on disk."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from .artifacts import cache_directory

_log = logging.getLogger("autodeploy")
_FOLDERS = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def compile_graph(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    path: Path,
    settings: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compiles a plain graph for fake inputs, whose symbolic sizes stay open, and writes it.

    settings: of `torch._inductor.config`, while it compiles.
    """
    from torch._inductor import config, standalone_compile

    _log.info("compiling with Inductor; the result is kept in %s", path)
    # Parameters keep requires_grad through export; with it a backward graph would be made too.
    values = [v.detach() if isinstance(v, torch.Tensor) else v for v in inputs]
    with torch.no_grad(), own_folders(), config.patch(dict(settings or {})):
        artifact = standalone_compile(module, values, dynamic_shapes="from_graph")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        artifact.save(path=str(unfinished), format="binary")
    unfinished.replace(path)
    function: Callable[..., Any] = artifact
    return function


def load_graph(path: Path) -> Callable[..., Any]:
    """What `compile_graph` wrote."""
    from torch._inductor import CompiledArtifact

    with own_folders():
        function: Callable[..., Any] = CompiledArtifact.load(path=str(path), format="binary")
    return function


@contextlib.contextmanager
def own_folders() -> Iterator[None]:
    """Inside, Inductor writes to our cache; after it, Triton writes where it did before.

    Inductor points Triton at a folder of its own, for the rest of the process.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    before = {name: os.environ.get(name) for name in _FOLDERS}
    # Importing it may have written its own choice there.
    if before[_FOLDERS[0]] in (None, default_cache_dir()):
        os.environ[_FOLDERS[0]] = str(cache_directory() / "inductor")
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
