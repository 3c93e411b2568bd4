"""OpenAI's messages in the shape that a chat template takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autodeploy.errors import InvalidRequestError

from .json_text import meaning, written
from .template_shape import TemplateShape, template_shape

# Fields of a part that hold its text, by the part's type.
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def template_messages(messages: Any, chat_template: str | None) -> list[dict[str, Any]]:
    """Messages of a request, as decoded from JSON, for `apply_chat_template`.

    Parts of text are joined by line breaks where the template takes strings, calls have their
    arguments as the template wants them, and results of tools get the name of the tool. Fields
    that templates do not know are left out.

    Raises:
        InvalidRequestError: a message is wrong; the text begins with its path.
    """
    if not isinstance(messages, list) or not messages:
        raise InvalidRequestError("messages: a list of messages, not empty")
    shape = template_shape(chat_template or "")
    tool_names: dict[str, str] = {}
    return [
        _message(message, f"messages[{index}]", shape, tool_names)
        for index, message in enumerate(messages)
    ]


def _message(
    message: Any, path: str, shape: TemplateShape, tool_names: dict[str, str]
) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"{path}: an object with role and content, not {message!r:.60}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequestError(f"{path}.role: system, user, assistant or tool, not {role!r:.60}")
    if role == "developer" and not shape.developer:
        role = "system"
    found: dict[str, Any] = {"role": role}
    calls = message.get("tool_calls") if role == "assistant" else None
    if calls:
        found["tool_calls"] = _calls(calls, f"{path}.tool_calls", shape, tool_names)
    found["content"] = _content(message.get("content"), f"{path}.content", role, shape, bool(calls))
    for field in ("name", "tool_call_id"):
        value = message.get(field)
        if isinstance(value, str):
            found[field] = value
        elif value is not None:
            raise InvalidRequestError(f"{path}.{field}: a string, not {value!r:.60}")
    if role == "tool":
        _name_tool(found, tool_names)
    if role == "assistant":
        _add_reasoning(found, message, path, shape)
    return found


def _content(content: Any, path: str, role: str, shape: TemplateShape, calls: bool) -> Any:
    if content is None:
        if role != "assistant":
            raise InvalidRequestError(f"{path}: a string or a list of parts, not null")
        if shape.none_content and calls:
            return None
        content = []
    if isinstance(content, str):
        texts = [content]
    elif isinstance(content, list):
        texts = [_part(part, f"{path}[{index}]") for index, part in enumerate(content)]
    else:
        raise InvalidRequestError(f"{path}: a string or a list of parts, not {content!r:.60}")
    if shape.content_parts:
        return [{"type": "text", "text": text} for text in texts]
    return "\n".join(texts)


def _part(part: Any, path: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise InvalidRequestError(f"{path}: a part with a type, not {part!r:.60}")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _TEXTS:
        raise InvalidRequestError(f"{path}.type: only text can be served, not {kind!r:.60}")
    text = part.get(_TEXTS[kind])
    if not isinstance(text, str):
        raise InvalidRequestError(f"{path}.{_TEXTS[kind]}: a string, not {text!r:.60}")
    return text


def _calls(
    calls: Any, path: str, shape: TemplateShape, tool_names: dict[str, str]
) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise InvalidRequestError(f"{path}: a list of calls, not {calls!r:.60}")
    found = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str):
            raise InvalidRequestError(f"{path}[{index}].function: an object with a name")
        arguments = function.get("arguments")
        call_id = call.get("id")
        if isinstance(call_id, str):
            tool_names[call_id] = name
        found.append({
            "id": call_id,
            "type": "function",
            "function": {
                "name": name,
                "arguments": _arguments(arguments, f"{path}[{index}].function.arguments", shape),
            },
        })  # fmt: skip
    return found


def _arguments(arguments: Any, path: str, shape: TemplateShape) -> Any:
    if isinstance(arguments, Mapping):
        return written(arguments) if shape.text_arguments else dict(arguments)
    if arguments is None or arguments == "":
        return "{}" if shape.text_arguments else {}
    if not isinstance(arguments, str):
        raise InvalidRequestError(f"{path}: the text of a JSON object, not {arguments!r:.60}")
    if shape.text_arguments:
        return arguments
    try:
        found = meaning(arguments)
    except ValueError as error:
        raise InvalidRequestError(
            f"{path}: the text of a JSON object, and this is none ({error}); leave out calls that "
            "were cut off"
        ) from error
    if not isinstance(found, dict):
        raise InvalidRequestError(f"{path}: the text of a JSON object, not {arguments:.60}")
    return found


def _name_tool(message: dict[str, Any], tool_names: Mapping[str, str]) -> None:
    """Some templates write the tool's name with its result, where OpenAI's API has only the id."""
    name = tool_names.get(message.get("tool_call_id", ""))
    if name is not None:
        message.setdefault("name", name)


def _add_reasoning(
    found: dict[str, Any], message: Mapping[str, Any], path: str, shape: TemplateShape
) -> None:
    for field in ("reasoning_content", "reasoning"):
        text = message.get(field)
        if text is None:
            continue
        if not isinstance(text, str):
            raise InvalidRequestError(f"{path}.{field}: a string, not {text!r:.60}")
        found["thinking" if shape.thinking else "reasoning_content"] = text
        return
