"""{"name": "f", "arguments": {"a": 1}}, or a list of such objects, and nothing around.

For models without a format of their own that were told in the prompt to write this; also what the
output must be when a tool is required (see `tool_schema`).
"""

from __future__ import annotations

from .. import call_object
from ..reader import Malformed, Wait
from ..stream import Format, Stream


def start(stream: Stream) -> Wait[bool]:
    """An object or a list."""
    yield from stream.text.space()
    if (yield from stream.text.peek()) not in ("{", "["):
        return False
    yield from call_object.calls(stream, marked=False)
    return True


def read(stream: Stream, marker: str) -> Wait[None]:
    """Never called: there is no marker."""
    raise Malformed
    yield


FORMAT = Format(read, start=start)
