"""<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>, one tag for each call.

Source: the Hermes function calling format (NousResearch/Hermes-Function-Calling), which several
families' chat templates have taken over.
"""

from __future__ import annotations

from .. import call_object
from ..reader import Wait
from ..stream import Format, Stream


def read(stream: Stream, marker: str) -> Wait[None]:
    """One object, or a list of them, up to the closing tag."""
    yield from stream.text.space()
    yield from call_object.calls(stream, marked=True)
    yield from stream.text.space()
    # Some serving set-ups drop it as a special token, so it may be missing.
    yield from stream.text.accept("</tool_call>")


FORMAT = Format(read, ("<tool_call>",), in_templates=(("<tool_call>",),), inner=("</tool_call>",))
