"""Scoped changes to a live model and to transformers' registries: made here, undone on exit.

The only place that monkey-patches. Everything is put back in reverse order, also on error, so
that the user's model and every registry are the same objects as before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from threading import RLock
from types import ModuleType
from typing import Any

from torch import nn

_ABSENT = object()
# Registries are global to the process: two captures at once would see each other's hooks.
_lock = RLock()


class Interception:
    """Records every change and how to undo it."""

    def __init__(self, undo: ExitStack) -> None:
        self._undo = undo

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Sets `owner.name`; on exit it is what it was, or absent if the owner had none itself."""
        before = vars(owner).get(name, _ABSENT)
        # nn.Module.__setattr__ would register modules and parameters; a hook is neither.
        write = object.__setattr__ if isinstance(owner, nn.Module) else setattr
        write(owner, name, value)

        def restore() -> None:
            if before is _ABSENT:
                vars(owner).pop(name, None) if not isinstance(owner, type) else delattr(owner, name)
            else:
                write(owner, name, before)

        self._undo.callback(restore)

    def keep_attributes(self, module: nn.Module) -> None:
        """On exit every attribute and buffer of `module` itself is what it is now."""
        attributes, buffers = dict(vars(module)), dict(module._buffers)

        def restore() -> None:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)

        self._undo.callback(restore)

    def set_item(self, mapping: MutableMapping[str, Any], key: str, value: Any) -> None:
        """Sets `mapping[key]`; on exit it is what it was, or absent."""
        before = mapping.get(key, _ABSENT)
        mapping[key] = value

        def restore() -> None:
            if before is _ABSENT:
                mapping.pop(key, None)
            else:
                mapping[key] = before

        self._undo.callback(restore)


@contextmanager
def interception() -> Iterator[Interception]:
    """Holds a set of changes; leaving the block, by any way, undoes them in reverse order."""
    with _lock, ExitStack() as undo:
        yield Interception(undo)


def modeling_modules(model: nn.Module) -> list[ModuleType]:
    """Python modules that define the classes of `model`'s parts, each once, in a stable order."""
    names = dict.fromkeys(
        base.__module__ for part in model.modules() for base in type(part).__mro__
    )
    skipped = ("torch.", "builtins", "typing", "transformers.modeling_", "transformers.generation")
    return [
        sys.modules[name]
        for name in names
        if name in sys.modules and not name.startswith(skipped) and name != "abc"
    ]
