"""`tools`, `tool_choice` and `parallel_tool_calls` of a request, checked.

Read as OpenAI's API reads them, in the shape of chat completions ({"type": "function", "function":
{"name": ...}}) and in that of responses ({"type": "function", "name": ...}).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from autodeploy.errors import InvalidRequestError

Choice = Literal["none", "auto", "required"]
MOST_TOOLS = 128
# OpenAI's own API allows no dot; servers of tools use it in names, and other servers allow it.
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. parameters: the JSON schema of its arguments."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False

    def for_template(self) -> dict[str, Any]:
        """The tool as chat templates expect it: always with description and an object's schema."""
        parameters = {"type": "object", "properties": {}, **self.parameters}
        function = {
            "name": self.name, "description": self.description or "", "parameters": parameters,
        }  # fmt: skip
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolOptions:
    """What a request says about tools.

    allowed: those that may be called, all of them or those that `tool_choice` lists. named: the
    one that must be called; then choice is required, and the output is its arguments.
    """

    tools: tuple[Tool, ...] = ()
    choice: Choice = "none"
    allowed: tuple[Tool, ...] = ()
    named: Tool | None = None
    parallel: bool = True

    @property
    def parameters(self) -> dict[str, Mapping[str, Any]]:
        """Schemas of the arguments by name, of the tools that may be called."""
        return {tool.name: tool.parameters for tool in self.allowed}

    def for_template(self) -> list[dict[str, Any]] | None:
        """The `tools` of a chat template; None if the model is not to know of any."""
        return [tool.for_template() for tool in self.tools] if self.choice != "none" else None


def tool_options(
    tools: Any = None, tool_choice: Any = None, parallel_tool_calls: Any = None
) -> ToolOptions:
    """The fields of a request, as decoded from JSON; None where it has none.

    Raises:
        InvalidRequestError: a field is wrong; the message begins with its path.
    """
    if not isinstance(parallel_tool_calls, bool | None):
        raise InvalidRequestError(
            f"parallel_tool_calls: true or false, not {parallel_tool_calls!r:.60}"
        )
    known = _tools(tools)
    if not known and tool_choice not in (None, "none", "auto"):
        raise InvalidRequestError("tool_choice: it needs tools, and the request has none; add them")
    choice, names, named = _choice(tool_choice, {tool.name: tool for tool in known})
    if not known:
        choice = "none"
    return ToolOptions(
        tools=known,
        choice=choice,
        allowed=tuple(t for t in known if names is None or t.name in names),
        named=named,
        parallel=parallel_tool_calls is not False,
    )


def _tools(tools: Any) -> tuple[Tool, ...]:
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise InvalidRequestError(f"tools: a list of tools, not {tools!r:.60}")
    if len(tools) > MOST_TOOLS:
        raise InvalidRequestError(f"tools: at most {MOST_TOOLS}, not {len(tools)}")
    found: dict[str, Tool] = {}
    for index, entry in enumerate(tools):
        tool = _tool(entry, f"tools[{index}]")
        if tool.name in found:
            raise InvalidRequestError(
                f"tools[{index}]: '{tool.name}' is declared twice; give each tool its own name"
            )
        found[tool.name] = tool
    return tuple(found.values())


def _tool(entry: Any, path: str) -> Tool:
    if not isinstance(entry, Mapping):
        raise InvalidRequestError(f"{path}: an object, not {entry!r:.60}")
    if entry.get("type", "function") != "function":
        raise InvalidRequestError(
            f"{path}.type: only 'function' tools can be served, not {entry['type']!r:.60}"
        )
    function: Any = entry
    if "function" in entry or "name" not in entry:
        function, path = entry.get("function"), f"{path}.function"
    if not isinstance(function, Mapping):
        raise InvalidRequestError(f"{path}: an object with a name, not {function!r:.60}")
    name, description = function.get("name"), function.get("description")
    parameters, strict = function.get("parameters"), function.get("strict")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{path}.name: 1 to 64 letters, digits, '_', '-' or '.', not {name!r:.80}"
        )
    if not (description is None or isinstance(description, str)):
        raise InvalidRequestError(f"{path}.description: a string, not {description!r:.60}")
    if parameters is not None:
        _check_parameters(parameters, f"{path}.parameters")
    if not isinstance(strict, bool | None):
        raise InvalidRequestError(f"{path}.strict: true or false, not {strict!r:.60}")
    return Tool(name, description, parameters or {}, bool(strict))


def _check_parameters(parameters: Any, path: str) -> None:
    if not isinstance(parameters, Mapping):
        raise InvalidRequestError(f"{path}: a JSON schema, not {parameters!r:.60}")
    if parameters.get("type", "object") != "object":
        raise InvalidRequestError(
            f"{path}.type: arguments are an object, not {parameters['type']!r:.60}"
        )
    properties = parameters.get("properties")
    if not (properties is None or isinstance(properties, Mapping)):
        raise InvalidRequestError(f"{path}.properties: an object, not {properties!r:.60}")


def _choice(
    choice: Any, known: Mapping[str, Tool]
) -> tuple[Choice, frozenset[str] | None, Tool | None]:
    """The choice, the names that it allows (None: all), and the one tool that it names."""
    if choice is None:
        return "auto", None, None
    if choice in ("none", "auto", "required"):
        return choice, None, None
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        name = _named(choice, known, "tool_choice")
        return "required", frozenset({name}), known[name]
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        return _allowed(choice, known)
    raise InvalidRequestError(
        "tool_choice: none, auto, required, {'type': 'function', 'function': {'name': ...}} or "
        f"{{'type': 'allowed_tools', ...}}, not {choice!r:.80}"
    )


def _allowed(
    choice: Mapping[str, Any], known: Mapping[str, Tool]
) -> tuple[Choice, frozenset[str], None]:
    path = "tool_choice"
    if "allowed_tools" in choice:
        choice, path = choice["allowed_tools"], "tool_choice.allowed_tools"
    entries = choice.get("tools") if isinstance(choice, Mapping) else None
    if not isinstance(entries, list) or not entries:
        raise InvalidRequestError(f"{path}.tools: a list of tools, not empty")
    mode = choice.get("mode", "auto")
    if mode not in ("auto", "required"):
        raise InvalidRequestError(f"{path}.mode: auto or required, not {mode!r:.60}")
    names = [_named(entry, known, f"{path}.tools[{i}]") for i, entry in enumerate(entries)]
    return mode, frozenset(names), None


def _named(entry: Any, known: Mapping[str, Tool], path: str) -> str:
    function = entry.get("function", entry) if isinstance(entry, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or name not in known:
        raise InvalidRequestError(
            f"{path}: it names {name!r:.80}, and tools has no such function; it has "
            f"{', '.join(known)}"
        )
    return name
