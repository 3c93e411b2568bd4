"""Formats by name: a file of `tools` or `reasoning` is a format, and its name is the format's.

A file defines FORMAT, and ALSO if it has other names. Adding a format is adding a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from autodeploy.errors import ConfigError

from . import reasoning, tools
from .stream import Format


def tool_format(name: str) -> Format:
    """The format of tool calls with this name.

    Raises:
        ConfigError: there is none.
    """
    return _find("--tool-call-parser", tool_formats(), name)


def reasoning_format(name: str) -> Format:
    """The format of reasoning with this name.

    Raises:
        ConfigError: there is none.
    """
    return _find("--reasoning-parser", reasoning_formats(), name)


@cache
def tool_formats() -> Mapping[str, Format]:
    """Every format of tool calls by name."""
    return _load(tools.__name__, tools.__path__)


@cache
def reasoning_formats() -> Mapping[str, Format]:
    """Every format of reasoning by name."""
    return _load(reasoning.__name__, reasoning.__path__)


def _load(package: str, path: list[str]) -> Mapping[str, Format]:
    formats: dict[str, Format] = {}
    for info in pkgutil.iter_modules(path):
        module = importlib.import_module(f"{package}.{info.name}")
        for name in (info.name, *getattr(module, "ALSO", ())):
            if name in formats:
                raise ConfigError(f"two formats in {package} are called '{name}'; rename one")
            formats[name] = module.FORMAT
    return formats


def _find(flag: str, formats: Mapping[str, Format], name: str) -> Format:
    if name not in formats:
        raise ConfigError(
            f"{flag} has no format '{name}'; it takes auto, {', '.join(sorted(formats))}"
        )
    return formats[name]
