"""<|tool_call|>[{"name": "f", "arguments": {"a": 1}}], or the list alone, or <tool_call> before it.

Source: IBM's chat templates up to version 3.3; later ones speak the format of `hermes`.
"""

from __future__ import annotations

from .. import call_object
from ..reader import Wait
from ..stream import Format, Stream


def read(stream: Stream, marker: str) -> Wait[None]:
    """A list of objects, up to a closing tag if there is one."""
    yield from stream.text.space()
    yield from call_object.calls(stream, marked=True)
    yield from stream.text.space()
    for closing in ("<|/tool_call|>", "</tool_call>"):
        yield from stream.text.accept(closing)


def start(stream: Stream) -> Wait[bool]:
    """The list without a tag."""
    yield from stream.text.space()
    if (yield from stream.text.peek()) != "[":
        return False
    yield from call_object.calls(stream, marked=False)
    return True


FORMAT = Format(
    read,
    markers=("<|tool_call|>", "<tool_call>"),
    start=start,
    in_templates=(("<|tool_call|>",),),
    inner=("<|/tool_call|>", "</tool_call>"),
)
