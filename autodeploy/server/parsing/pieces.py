"""What parsing text gives: content, reasoning and tool calls, whole or in pieces."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
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
    for kind, group in groupby((piece for piece in pieces if _says_something(piece)), _kind):
        if kind == "head":
            merged += group
            continue
        run = list(group)
        merged.append(run[0] if len(run) == 1 else _joined(run))
    return merged


def _says_something(piece: Piece) -> bool:
    if isinstance(piece, str):
        return bool(piece)
    if isinstance(piece, Reasoning):
        return bool(piece.text)
    return piece.name is not None or bool(piece.arguments)


def _kind(piece: Piece) -> str | int:
    if isinstance(piece, str):
        return "content"
    if isinstance(piece, Reasoning):
        return "reasoning"
    return "head" if piece.name is not None else piece.index


def _joined(run: list[Piece]) -> Piece:
    """One piece of a run of the same kind; joined at once, since a run may be long."""
    if isinstance(run[0], str):
        return "".join(piece for piece in run if isinstance(piece, str))
    if isinstance(run[0], Reasoning):
        return Reasoning("".join(piece.text for piece in run if isinstance(piece, Reasoning)))
    arguments = "".join(piece.arguments for piece in run if isinstance(piece, ToolDelta))
    return ToolDelta(run[0].index, arguments=arguments)
