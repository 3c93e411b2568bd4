"""Items of a response's input become the messages of a conversation.

OpenAI's items are flat: a message, reasoning, a call and its output stand side by side. Chat
templates want one assistant message that holds what the assistant did in one turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import ApiError, invalid

Item = dict[str, Any]
_ROLES = ("user", "assistant", "system", "developer")
_PLAIN = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}


def input_items(given: str | list[Item]) -> list[Item]:
    """The input as items."""
    return (
        [{"type": "message", "role": "user", "content": given}] if isinstance(given, str) else given
    )


def messages_of(items: Sequence[Item], instructions: str | None = None) -> list[dict[str, Any]]:
    """The conversation that the items are, for `template_messages`.

    instructions: a system message in front; one that follows is joined to it, because many
    templates take only one.

    Raises:
        ApiError: an item is wrong, or no text; `param` is its path.
    """
    if not items:
        raise invalid("input is empty; give a text or at least one item", "input")
    reading = _Reading()
    for index, item in enumerate(items):
        reading.add(item, f"input[{index}]")
    messages = reading.messages
    if instructions is None:
        return messages
    if messages[:1] and messages[0]["role"] in ("system", "developer"):
        first, *messages = messages
        parts = [{"type": "text", "text": instructions}, *_as_parts(first["content"])]
        return [{**first, "content": parts}, *messages]
    return [{"role": "system", "content": instructions}, *messages]


class _Reading:
    """Puts items together, one after the other."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._turn: dict[str, Any] | None = None
        """The assistant's message, as long as its items follow each other."""
        self._calls: set[str] = set()

    def add(self, item: Any, path: str) -> None:
        if not isinstance(item, Mapping):
            raise invalid(f"{path}: an object, not {item!r:.60}", path)
        kind = item.get("type", "message" if "role" in item else None)
        if kind == "message":
            self._message(item, path)
        elif kind == "reasoning":
            self._reasoning(item, path)
        elif kind == "function_call":
            self._call(item, path)
        elif kind == "function_call_output":
            self._output(item, path)
        else:
            raise invalid(
                f"{path}.type: items of type {kind!r:.60} cannot be served; messages, reasoning, "
                "function_call and function_call_output can",
                f"{path}.type",
            )

    def _message(self, item: Mapping[str, Any], path: str) -> None:
        role = item.get("role")
        if role not in _ROLES:
            raise invalid(f"{path}.role: {', '.join(_ROLES)}, not {role!r:.60}", f"{path}.role")
        content = _content(item.get("content"), f"{path}.content")
        if role != "assistant":
            self._turn = None
            self.messages.append({"role": role, "content": content})
        elif self._turn is not None and self._turn["content"] is None:
            self._turn["content"] = content
        else:
            self._begin_turn(content)

    def _reasoning(self, item: Mapping[str, Any], path: str) -> None:
        texts = []
        for field in ("content", "summary"):
            parts = item.get(field) or []
            if not isinstance(parts, list) or not all(isinstance(p, Mapping) for p in parts):
                raise invalid(f"{path}.{field}: a list of parts", f"{path}.{field}")
            texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
            if texts:
                break
        if not texts:
            return  # only encrypted: somebody else's
        self._begin_turn(None)["reasoning_content"] = "\n".join(texts)

    def _call(self, item: Mapping[str, Any], path: str) -> None:
        for field in ("call_id", "name", "arguments"):
            if not isinstance(item.get(field), str):
                raise invalid(f"{path}.{field}: a string is needed", f"{path}.{field}")
        turn = self._turn or self._begin_turn(None)
        self._calls.add(item["call_id"])
        function = {"name": item["name"], "arguments": item["arguments"]}
        turn.setdefault("tool_calls", []).append(
            {"id": item["call_id"], "type": "function", "function": function}
        )

    def _output(self, item: Mapping[str, Any], path: str) -> None:
        call = item.get("call_id")
        if not isinstance(call, str) or call not in self._calls:
            raise invalid(
                f"{path}.call_id: no function_call with call_id {call!r:.80} comes before",
                f"{path}.call_id",
            )
        self._turn = None
        content = _content(item.get("output"), f"{path}.output")
        self.messages.append({"role": "tool", "tool_call_id": call, "content": content})

    def _begin_turn(self, content: Any) -> dict[str, Any]:
        self._turn = {"role": "assistant", "content": content}
        self.messages.append(self._turn)
        return self._turn


def _content(content: Any, path: str) -> Any:
    """A text, or parts of text.

    Raises:
        ApiError: there is something else in it.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"{path}: a string or a list of parts, not {content!r:.60}", path)
    return [{"type": "text", "text": _text(part, f"{path}[{i}]")} for i, part in enumerate(content)]


def _text(part: Any, path: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str) or kind not in _PLAIN:
        raise invalid(f"{path}.type: only text can be served, not {kind!r:.60}", f"{path}.type")
    text = part.get(_PLAIN[kind])
    if not isinstance(text, str):
        raise _no_text(f"{path}.{_PLAIN[kind]}", text)
    return text


def _no_text(path: str, value: Any) -> ApiError:
    return invalid(f"{path}: a string, not {value!r:.60}", path)


def _as_parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def without_first(items: Sequence[Item], count: int) -> list[Item]:
    """The items without the first `count` that are no system messages, and without outputs whose
    calls are gone."""
    kept: list[Item] = []
    calls: set[str] = set()
    for item in items:
        system = item.get("role") in ("system", "developer")
        if count and not system:
            count -= 1
            continue
        if item.get("type") == "function_call":
            calls.add(item["call_id"])
        if item.get("type") != "function_call_output" or item["call_id"] in calls:
            kept.append(item)
    return kept
