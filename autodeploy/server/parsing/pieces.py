"""What parsing text gives: content, reasoning and tool calls, whole or in pieces."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class ToolCall:
    """One call. arguments: the text of a JSON object, as OpenAI's API has it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Parsed:
    """A whole answer; None where there is no such part."""

    content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str | None = None


@dataclass(frozen=True)
class Reasoning:
    """A piece of the reasoning, in a stream."""

    text: str


@dataclass(frozen=True)
class ToolDelta:
    """A piece of a call, in a stream: first id and name, then pieces of the arguments' text."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


Piece: TypeAlias = str | Reasoning | ToolDelta
"""A plain string is content."""


def join(pieces: Iterable[Piece]) -> Parsed:
    """The answer that the pieces of a stream make."""
    content: list[str] = []
    reasoning: list[str] = []
    heads: list[ToolDelta] = []
    arguments: list[list[str]] = []
    for piece in pieces:
        if isinstance(piece, str):
            content.append(piece)
        elif isinstance(piece, Reasoning):
            reasoning.append(piece.text)
        else:
            if piece.name is not None:
                heads.append(piece)
                arguments.append([])
            arguments[piece.index].append(piece.arguments)
    calls = (
        ToolCall(head.id or "", head.name or "", "".join(parts))
        for head, parts in zip(heads, arguments, strict=True)
    )
    return Parsed("".join(content) or None, tuple(calls), "".join(reasoning) or None)


def merge(pieces: Iterable[Piece]) -> list[Piece]:
    """The same pieces with neighbours of one kind put together; empty ones are dropped."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if isinstance(piece, str):
            if not piece:
                continue
            if isinstance(last, str):
                merged[-1] = last + piece
                continue
        elif isinstance(piece, Reasoning):
            if isinstance(last, Reasoning):
                merged[-1] = Reasoning(last.text + piece.text)
                continue
        elif piece.name is None:
            if not piece.arguments:
                continue
            if isinstance(last, ToolDelta) and last.name is None:
                # No call begins between them, so both are pieces of one call.
                merged[-1] = ToolDelta(last.index, arguments=last.arguments + piece.arguments)
                continue
        merged.append(piece)
    return merged
