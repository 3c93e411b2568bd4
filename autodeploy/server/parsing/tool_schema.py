"""What the output must be when a tool is required, and how it is read then.

One named tool: its arguments and nothing else. Any tool: a list of {"name", "parameters"}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .answer import AnswerParser
from .json_text import object_
from .reader import Malformed, Wait
from .registry import tool_format
from .stream import Format, Stream
from .tool_options import Tool, ToolOptions

# Values of these keywords are data, not schemas.
_DATA = ("const", "default", "enum", "example", "examples")


def required_output(options: ToolOptions) -> dict[str, Any] | None:
    """The JSON schema that the output must follow; None if no tool is required."""
    if options.choice != "required":
        return None
    if options.named is not None:
        return _object_schema(options.named)
    definitions: dict[str, Any] = {}
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [_call_schema(tool, definitions) for tool in options.allowed]},
    }
    if not options.parallel:
        schema["maxItems"] = 1
    if definitions:
        schema["$defs"] = definitions
    return schema


def answer_parser(
    options: ToolOptions, tools: Format | None, reasoning: Format | None = None
) -> AnswerParser:
    """The parser of a request's answers.

    tools, reasoning: what the model speaks by itself. Where a tool is required the output follows
    `required_output` instead; where none may be called, what looks like a call is content.
    """
    form = tools
    if options.choice == "none":
        form = None
    elif options.named is not None:
        form = _arguments_of(options.named.name)
    elif options.choice == "required":
        form = tool_format("json")
    return AnswerParser(form, reasoning, options.parameters, options.parallel)


def _object_schema(tool: Tool) -> dict[str, Any]:
    return {"type": "object", **tool.parameters}


def _call_schema(tool: Tool, definitions: dict[str, Any]) -> dict[str, Any]:
    """One call's schema; what refers to its own root goes into `definitions`."""
    parameters = _object_schema(tool)
    moved = _moved(parameters, f"#/$defs/{tool.name}")
    if moved != parameters:
        definitions[tool.name] = moved
        parameters = {"$ref": f"#/$defs/{tool.name}"}
    return {
        "type": "object",
        "properties": {"name": {"type": "string", "enum": [tool.name]}, "parameters": parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _moved(schema: Any, root: str, named: bool = False) -> Any:
    """The schema with references to its root (#/...) pointing to where it will be.

    named: the keys here are names of properties or definitions, not keywords.
    """
    if isinstance(schema, list):
        return [_moved(entry, root) for entry in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if not named and key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = root + value[1:]
        elif not named and key in _DATA:
            moved[key] = value
        else:
            names = key in ("properties", "patternProperties", "$defs", "definitions")
            moved[key] = _moved(value, root, named=names and not named)
    return moved


def _arguments_of(name: str) -> Format:
    """A format whose whole text is one tool's arguments."""

    def start(stream: Stream) -> Wait[bool]:
        yield from stream.text.space()
        if (yield from stream.text.peek()) != "{":
            return False
        stream.begin(name)
        yield from object_(stream.text, stream.arguments)
        stream.finish()
        return True

    def after(stream: Stream, marker: str) -> Wait[None]:
        raise Malformed
        yield

    return Format(after, start=start)
