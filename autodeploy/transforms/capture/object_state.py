"""Objects as trees of leaves: how a model's own cache is read, compared and refilled.

A cache of transformers, a list of states, or a module that keeps what it needs on itself: each is
containers and plain objects around tensors and counters. A leaf has a path, the steps from the
root to it, by which it is set again later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

Path = tuple[tuple[str, Any], ...]
"""Steps ("item", key) or ("attribute", name)."""

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def leaves(root: Any, also: tuple[type, ...] = ()) -> dict[Path, Any]:
    """Tensors, numbers, None and `also` under `root`, by path. Modules are not entered."""
    return dict(_walk(root, (), set(), (torch.Tensor, *_PLAIN, *also)))


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """What a module and its parts keep on themselves beside parameters, buffers and parts."""
    hidden = ("_parameters", "_buffers", "_modules", "training", "config")
    return {
        f"{path}.{name}" if path else name: value
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if name not in hidden and not name.startswith(("_forward", "_backward", "_state_dict"))
        and not name.startswith(("_load_", "_is_", "_non_persistent", "_hf_", "forward"))
    }  # fmt: skip


def get_leaf(root: Any, path: Path) -> Any:
    """The value at a path."""
    for kind, name in path:
        root = root[name] if kind == "item" else getattr(root, name)
    return root


def set_leaf(root: Any, path: Path, value: Any) -> None:
    """Puts a value at a path.

    Raises:
        TypeError: the path ends in a tuple, which cannot be changed.
    """
    owner = get_leaf(root, path[:-1])
    kind, name = path[-1]
    if kind == "item":
        owner[name] = value
    else:
        object.__setattr__(owner, name, value)


def rebuilt(value: Any, path: Path, replaced: Mapping[Path, Any]) -> Any:
    """A value with some leaves replaced; nothing recorded is changed."""
    if path in replaced:
        return replaced[path]
    if isinstance(value, dict):
        return {k: rebuilt(v, (*path, ("item", k)), replaced) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(rebuilt(v, (*path, ("item", i)), replaced) for i, v in enumerate(value))
    return value


def _walk(
    value: Any, path: Path, seen: set[int], ends: tuple[type, ...]
) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, ends):
        yield path, value
        return
    if id(value) in seen or isinstance(value, (nn.Module, type)) or callable(value):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _walk(inner, (*path, ("item", key)), seen, ends)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _walk(inner, (*path, ("item", index)), seen, ends)
    elif hasattr(value, "__dict__") and not hasattr(value, "to_dict"):
        for name, inner in vars(value).items():
            yield from _walk(inner, (*path, ("attribute", name)), seen, ends)
