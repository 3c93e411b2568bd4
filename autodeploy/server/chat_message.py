"""The text of a sequence becomes the fields of a chat message: content, reasoning, tool calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidRequestError
from .config import ServerConfig
from .errors import ApiError, invalid
from .parsing import (
    AnswerParser,
    Format,
    Piece,
    Reasoning,
    ToolDelta,
    ToolOptions,
    answer_parser,
    detect,
    reasoning_format,
    tool_format,
    tool_options,
)
from .protocol.chat import ChatRequest, Message
from .protocol.responses import ResponseRequest


@dataclass(frozen=True)
class Formats:
    """How the model writes calls of tools and its reasoning; None: not at all, or unknown."""

    tools: Format | None = None
    reasoning: Format | None = None


def formats_of(config: ServerConfig, chat_template: str | None) -> Formats:
    """What the flags name, or, for auto, what the chat template speaks.

    Raises:
        ConfigError: a flag names a format that there is not.
    """
    found = detect(chat_template)
    tools = _named(config.tool_call_parser, found.tool_parser)
    reasoning = _named(config.reasoning_parser, found.reasoning_parser)
    return Formats(
        None if tools is None else tool_format(tools),
        None if reasoning is None else reasoning_format(reasoning),
    )


def _named(flag: str, detected: str | None) -> str | None:
    return {"auto": detected, "none": None}.get(flag, flag)


def options_of(request: ChatRequest | ResponseRequest, formats: Formats) -> ToolOptions:
    """What a request says about tools.

    Raises:
        ApiError: it contradicts itself, or calls could not be told from text.
    """
    options = with_path(tool_options, request.tools, request.tool_choice,
                        request.parallel_tool_calls)  # fmt: skip
    if options.choice == "auto" and formats.tools is None:
        raise invalid(
            "how this model writes calls of tools is not known here; use tool_choice='required' "
            "or a named one, or start the server with --tool-call-parser",
            "tools",
        )
    return options


def with_path(function: Any, *args: Any) -> Any:
    """What `function` returns; its errors, which begin with a path, name the field.

    Raises:
        ApiError: for its InvalidRequestError.
    """
    try:
        return function(*args)
    except ApiError:
        raise
    except InvalidRequestError as error:
        path, colon, _ = str(error).partition(":")
        raise invalid(str(error), path if colon else None) from error


def parser_of(options: ToolOptions, formats: Formats) -> AnswerParser:
    """What reads the answers to a request."""
    return answer_parser(options, formats.tools, formats.reasoning)


class MessageReader:
    """Reads the text of one sequence, as it comes or as a whole.

    prompt: what the sequence goes on with: templates may open the reasoning there. named: the
    request demanded one tool by its name, whose call OpenAI's API does not tell as such.
    """

    def __init__(self, parser: AnswerParser, prompt: str, named: bool = False) -> None:
        self._parser = parser
        self._prompt = prompt
        self._named = named
        self.is_plain = parser.tools is None and parser.reasoning is None
        """Whether the message is the text and nothing else."""
        self._stream = None if self.is_plain else parser.stream(prompt)
        self._called = False

    def whole(self, text: str) -> Message:
        """The message of a finished text."""
        if self.is_plain:
            return Message(role="assistant", content=text, refusal=None)
        parsed = self._parser.whole(text, self._prompt)
        self._called = bool(parsed.tool_calls)
        content = parsed.content if self._called else parsed.content or ""
        message = Message(role="assistant", content=content, refusal=None)
        if parsed.reasoning is not None:
            message.reasoning_content = parsed.reasoning
        if parsed.tool_calls:
            message.tool_calls = [
                _call(call.id, call.name, call.arguments) for call in parsed.tool_calls
            ]
        return message

    def add(self, text: str, finished: bool) -> Message | None:
        """What `text`, the next piece, adds to the message; None if nothing can be said yet."""
        if self._stream is None:
            return Message(content=text) if text else None
        pieces = self._stream.push(text) if text else []
        if finished:
            pieces += self._stream.end()
        return self._message(pieces) if pieces else None

    def finish_reason(self, reason: str | None) -> str | None:
        """The reason to tell for the engine's."""
        return "tool_calls" if self._called and not self._named and reason == "stop" else reason

    def _message(self, pieces: Iterable[Piece]) -> Message:
        message = Message()
        calls = []
        for piece in pieces:
            if isinstance(piece, str):
                message.content = (message.content or "") + piece
            elif isinstance(piece, Reasoning):
                message.reasoning_content = (message.reasoning_content or "") + piece.text
            else:
                calls.append(_call_piece(piece))
        if calls:
            self._called = True
            message.tool_calls = calls
        return message


def _call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def _call_piece(piece: ToolDelta) -> dict[str, Any]:
    if piece.name is None:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    return {"index": piece.index, **_call(piece.id or "", piece.name, piece.arguments)}
