"""Calls in harmony's messages (see `harmony`): those with a recipient.

Messages to the reader lose their markup. Reasoning keeps it, unless the reasoning format of the
same family has taken it out before.
"""

from __future__ import annotations

from .. import harmony
from ..json_text import object_
from ..reader import Malformed, Wait
from ..stream import Format, Stream

_FUNCTIONS = "functions."


def read(stream: Stream, marker: str) -> Wait[None]:
    """One message."""
    header = yield from harmony.header(stream, marker)
    if header.recipient is not None:
        yield from _call(stream, header.recipient)
    elif header.channel in ("final", "commentary"):
        yield from harmony.body(stream, stream.content)
    else:
        raise Malformed


def start(stream: Stream) -> Wait[bool]:
    """The recipient may come first: it belongs to the role, which the prompt has written."""
    if not (yield from stream.text.accept(harmony.RECIPIENT)):
        return False
    yield from read(stream, harmony.RECIPIENT)
    return True


def _call(stream: Stream, recipient: str) -> Wait[None]:
    name = recipient.removeprefix(_FUNCTIONS)
    if name == recipient and not (stream.parameters and stream.knows(name)):
        # A tool that the model has by itself, such as a browser: nobody here can run it.
        raise Malformed
    text = stream.text
    yield from text.space()
    if (yield from text.accept("<|call|>")):
        stream.call(name, "{}")
        return
    if (yield from text.peek()) != "{":
        raise Malformed
    stream.begin(name)
    yield from object_(text, stream.arguments)
    stream.finish()
    yield from harmony.end(stream)


FORMAT = Format(read, harmony.MARKERS, start, harmony.IN_TEMPLATES, harmony.INNER)
