"""The text of a sequence becomes the fields of a chat message: content, and what else it holds."""

from __future__ import annotations

from typing import Any

from .errors import invalid
from .protocol.chat import ChatRequest, Message


class MessageReader:
    """Reads the text of one sequence, as it comes or as a whole."""

    def __init__(self, request: ChatRequest) -> None:
        self.request = request

    def whole(self, text: str) -> Message:
        """The message of a finished text."""
        return Message(role="assistant", content=text, refusal=None)

    def add(self, text: str, finished: bool) -> Message | None:
        """What `text`, the next piece, adds to the message; None if nothing can be said yet."""
        return Message(content=text) if text else None

    def finish_reason(self, reason: str | None) -> str | None:
        """The reason to tell for the engine's."""
        return reason


def check_tools(request: ChatRequest) -> None:
    """Refuses what would need outputs to be read as calls of tools.

    Raises:
        ApiError: a call is demanded.
    """
    choice: Any = request.tool_choice
    if choice not in (None, "none", "auto"):
        raise invalid(
            "tool_choice demands a call, which is not served here; use 'auto' or 'none'",
            "tool_choice",
        )
    if choice == "auto" and not request.tools:
        raise invalid("tool_choice is allowed only with tools", "tool_choice")
