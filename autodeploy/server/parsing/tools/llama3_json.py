"""{"name": "f", "parameters": {"a": 1}}; several with ; between, perhaps after <|python_tag|>.

Source: Meta's prompt formats for its versions 3.1 to 3.3. Calls of built-in tools, which are code
after <|python_tag|>, come out as content.
"""

from __future__ import annotations

from .. import call_object
from ..reader import Wait
from ..stream import Format, Stream

ALSO = ("llama4_json",)


def read(stream: Stream, marker: str) -> Wait[None]:
    """Objects or lists of them, after the tag."""
    yield from stream.text.space()
    yield from _calls(stream, marked=True)


def start(stream: Stream) -> Wait[bool]:
    """Objects without a tag."""
    yield from stream.text.space()
    if (yield from stream.text.peek()) not in ("{", "["):
        return False
    yield from _calls(stream, marked=False)
    return True


def _calls(stream: Stream, marked: bool) -> Wait[None]:
    text = stream.text
    while True:
        yield from call_object.calls(stream, marked)
        yield from text.space()
        if not ((yield from text.accept(";")) or (yield from text.accept(","))):
            return
        yield from text.space()
        if (yield from text.peek()) == "":
            return


FORMAT = Format(
    read,
    markers=("<|python_tag|>",),
    start=start,
    in_templates=(
        ("<|start_header_id|>", '"parameters"'),
        ('{"name": function name',),
        ("<|python_tag|>",),
    ),
)
