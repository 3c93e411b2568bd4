"""Which formats a chat template speaks, by the markers in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .registry import reasoning_formats, tool_formats
from .stream import Format


@dataclass(frozen=True)
class Detected:
    """Names of formats; None where the template shows none."""

    tool_parser: str | None
    reasoning_parser: str | None


def detect(chat_template: str | None) -> Detected:
    """The formats whose markers the template has; of several, the one with most of them."""
    template = chat_template or ""
    return Detected(_best(template, tool_formats()), _best(template, reasoning_formats()))


def _best(template: str, formats: Mapping[str, Format]) -> str | None:
    found = [
        (len(markers), sum(map(len, markers)), name)
        for name, form in formats.items()
        for markers in form.in_templates
        if all(marker in template for marker in markers)
    ]
    # An alias comes after the file's own name, so among equals the first is meant.
    return max(found, key=lambda entry: entry[:2])[2] if found else None
