"""Values written as bare text: what they mean is said by the tool's JSON schema."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from .json_text import meaning, written

_PYTHON = {"bool": "boolean", "int": "integer", "float": "number", "list": "array",
           "dict": "object", "str": "string", "NoneType": "null"}  # fmt: skip


def types_of(schema: Any, key: str) -> frozenset[str]:
    """JSON types that a parameter may have; empty if the schema does not say."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return _types(properties.get(key)) if isinstance(properties, Mapping) else frozenset()


def _types(schema: Any, depth: int = 0) -> frozenset[str]:
    if not isinstance(schema, Mapping) or depth > 10:
        return frozenset()
    types = schema.get("type")
    if isinstance(types, str):
        return frozenset({types})
    if isinstance(types, list):
        return frozenset(name for name in types if isinstance(name, str))
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list):
        return frozenset(_PYTHON.get(type(value).__name__, "string") for value in values)
    found: frozenset[str] = frozenset()
    for word in ("anyOf", "oneOf", "allOf"):
        branches = schema.get(word)
        if isinstance(branches, list):
            found = found.union(*(_types(branch, depth + 1) for branch in branches))
    return found


def typed(text: str, types: frozenset[str]) -> str:
    """The JSON of a value; a string if it is nothing else of these types."""
    value = _literal(text.strip())
    if value is not None or text.strip() in ("null", "None"):
        kind = _PYTHON[type(value).__name__]
        if kind in types or (kind == "integer" and "number" in types):
            return written(value)
        if kind == "number" and "integer" in types and value == int(value):
            return written(int(value))
    return written(text)


def _literal(text: str) -> Any:
    """What JSON or Python reads in the text; None if nothing that JSON could hold."""
    if text in ("True", "False"):
        return text == "True"
    try:
        return meaning(text)
    except ValueError:
        # Python's way of writing it, perhaps.
        pass
    if not text.startswith(("[", "{")):
        return None
    try:
        value = ast.literal_eval(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, (list, dict)) else None
