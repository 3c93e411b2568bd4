"""Reasoning in harmony's analysis channel (see `harmony`).

Messages to the reader lose their markup; calls keep it, for the tool format of the same family.
"""

from __future__ import annotations

from .. import harmony
from ..reader import Malformed, Wait
from ..stream import Format, Stream


def read(stream: Stream, marker: str) -> Wait[None]:
    """One message."""
    header = yield from harmony.header(stream, marker)
    if header.recipient is not None:
        raise Malformed
    if header.channel == "analysis":
        yield from harmony.body(stream, stream.reasoning)
    elif header.channel in ("final", "commentary"):
        yield from harmony.body(stream, stream.content)
    else:
        raise Malformed


def start(stream: Stream) -> Wait[bool]:
    """A recipient may come first; then it is a call."""
    if not (yield from stream.text.accept(harmony.RECIPIENT)):
        return False
    yield from harmony.header(stream, harmony.RECIPIENT)
    raise Malformed


FORMAT = Format(read, harmony.MARKERS, start, harmony.IN_TEMPLATES, harmony.INNER)
