"""Warm starts: the program of a checkpoint, kept on disk for the next time.

The key covers everything that decides what the program is: the config file, the names, shapes
and dtypes of the checkpoint's tensors, code that comes with the checkpoint, the resolved recipe,
the sources of this package's transforms and ops, and the versions of torch and transformers. A
live model is never looked up: hooks and patches on it have no key.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .config import DeployConfig
from .custom_ops.op import OPS
from .errors import CheckpointError, TransformError
from .runtime.packed_runner import PackedRunner
from .transforms.artifact import read, restore, store
from .transforms.artifacts import cache_directory, environment_key
from .transforms.program import Program
from .transforms.recipe import Recipe

_log = logging.getLogger("autodeploy")


class KeptProgram:
    """The place on disk of one checkpoint's program under one recipe."""

    def __init__(self, checkpoint: Path, config: DeployConfig, recipe: Recipe) -> None:
        self._headers = safetensors_headers(checkpoint)
        key = hashlib.sha256()
        for part in (environment_key(), recipe.to_yaml(), config.dtype, config.device):
            key.update(part.encode() + b"\0")
        for file in sorted([checkpoint / "config.json", *checkpoint.glob("*.py")]):
            key.update(file.read_bytes() + b"\0")
        for file, header in sorted(self._headers.items()):
            shapes = {n: (h["dtype"], h["shape"]) for n, h in sorted(header.items())}
            key.update(f"{file.name} {json.dumps(shapes)}".encode())
        self._path = cache_directory() / "programs" / f"{key.hexdigest()[:32]}.program"

    @classmethod
    def of(cls, config: DeployConfig, recipe: Recipe) -> KeptProgram | None:
        """The place for `config`; None if it cannot have one or must not use it."""
        if not isinstance(config.model, (str, Path)) or not Path(config.model).is_dir():
            return None
        folder = Path(config.model)
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            return None
        if config.load_format != "auto":
            return None
        if config.verify or config.dump_graphs or recipe.imports or _has_foreign_code(recipe):
            # Each asks for the work to be done, or depends on code the key does not see.
            return None
        return cls(folder, config, recipe)

    @property
    def exists(self) -> bool:
        return self._path.is_file()

    @property
    def refused(self) -> bool:
        """Whether an earlier start found that this program cannot be kept."""
        return self._path.with_suffix(".refused").is_file()

    def refuse(self, why: str) -> None:
        """Remembers that it cannot be kept, so that no start tries in vain again."""
        _log.info("the program is not kept for a warm start: %s", why)
        note = self._path.with_suffix(".refused")
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(why + "\n")

    def keep(self, program: Program, facts: dict[str, str]) -> str | None:
        """Writes the program; returns why it cannot be kept, or None."""
        shapes = {
            name: torch.Size(entry["shape"])
            for header in self._headers.values()
            for name, entry in header.items()
            if _DTYPES.get(entry["dtype"]) == program.contract.dtype
        }
        with _opened(self._headers) as read_tensor:
            return store(program, shapes, read_tensor, facts, self._path)

    def restore(self) -> tuple[PackedRunner, dict[str, str]]:
        """A runner of the kept program, with weights read from the checkpoint.

        Raises:
            TransformError: the file is damaged; the message says which to delete.
        """
        stored = read(self._path)
        with _opened(self._headers) as read_tensor:
            compiled, weight_bytes = restore(stored, read_tensor)
        return PackedRunner(compiled, compiled.contract, weight_bytes), stored.facts


def _has_foreign_code(recipe: Recipe) -> bool:
    """Whether a transform, or a way to run one of our ops, comes from outside this package.

    An op from outside gets into a program only through such a transform.
    """

    def ours(thing: Any) -> bool:
        return str(thing.__module__).split(".")[0] == __name__.split(".")[0]

    ways = [i.function for op in OPS.values() if ours(op.reference) for i in op.implementations]
    return not all(ours(t) for t in (*(type(step.transform) for step in recipe.steps), *ways))


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@contextlib.contextmanager
def _opened(headers: dict[Path, dict[str, Any]]) -> Iterator[Any]:
    from safetensors import safe_open

    with contextlib.ExitStack() as stack:
        files: dict[Path, Any] = {}
        where = {name: file for file, header in headers.items() for name in header}

        def read_tensor(name: str) -> torch.Tensor:
            if name not in where:
                raise TransformError(f"tensor '{name}' is not in the checkpoint any more")
            file = where[name]
            if file not in files:
                files[file] = stack.enter_context(safe_open(file, framework="pt"))
            return files[file].get_tensor(name)

        yield read_tensor


def safetensors_headers(folder: Path) -> dict[Path, dict[str, Any]]:
    """dtype, shape and offsets of every tensor, per file.

    Source: the safetensors format: 8 bytes of little-endian length, then JSON.

    Raises:
        CheckpointError: a file is cut short or is not safetensors.
    """
    headers = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(length))
        except (struct.error, ValueError, OSError, MemoryError, OverflowError) as error:
            raise CheckpointError(
                f"'{file}' is not a readable safetensors file: {error}"
            ) from error
        header.pop("__metadata__", None)
        headers[file] = header
    return headers
