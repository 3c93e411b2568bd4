"""The harmony format: every message has a channel and perhaps a recipient.

    <|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>commentary
    to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>

Channels: analysis is reasoning, commentary holds calls and remarks before them, final the answer.
Source: OpenAI's harmony guide. An answer begins inside a message, after <|start|>assistant.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .reader import Wait
from .stream import Stream

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
ENDS = ("<|end|>", "<|return|>", "<|call|>")
MARKERS = (START, CHANNEL)
INNER = (MESSAGE, *ENDS, "<|constrain|>")
IN_TEMPLATES = ((CHANNEL, MESSAGE),)
RECIPIENT = " to="

_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_LONGEST_HEADER = 400


@dataclass(frozen=True)
class Header:
    """What stands before a message's text."""

    channel: str | None
    recipient: str | None


def header(stream: Stream, marker: str) -> Wait[Header]:
    """Reads the rest of a header that begins with `marker`.

    Raises:
        Malformed: no message follows.
    """
    text = marker + (yield from stream.text.through(MESSAGE, _LONGEST_HEADER))
    channel, recipient = _CHANNEL.search(text), _RECIPIENT.search(text)
    return Header(channel and channel[1], recipient and recipient[1])


def body(stream: Stream, give: Callable[[str], None]) -> Wait[None]:
    """Gives out a message's text up to its end, and reads that; a new header ends it, too."""
    text = stream.text
    while True:
        piece, end = yield from text.until((*ENDS, *MARKERS))
        give(piece)
        text.forget()
        if end is None and text.ended:
            return
        if end in ENDS:
            text.take(len(end))
            text.forget()
            return
        if end is not None:
            return


def end(stream: Stream) -> Wait[None]:
    """Reads what ends a message, if it comes."""
    yield from stream.text.space()
    for marker in ENDS:
        if (yield from stream.text.accept(marker)):
            return
