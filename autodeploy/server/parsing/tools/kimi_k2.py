"""<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>, many.

The id that the model writes, functions.f:0, is the call's id: the template wants it back. Source:
the published chat template and its guide to tool calls.
"""

from __future__ import annotations

from ..json_text import object_
from ..reader import Malformed, Wait
from ..stream import Format, Stream

_ALL_BEGIN, _ALL_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_BEGIN, _ARGUMENTS, _END = (
    "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
)  # fmt: skip
_LONGEST_ID = 256


def read(stream: Stream, marker: str) -> Wait[None]:
    """Calls up to the section's end; the inner marker alone begins one, too."""
    text = stream.text
    yield from text.space()
    if marker == _ALL_BEGIN:
        yield from text.expect(_BEGIN)
    while True:
        yield from _call(stream)
        yield from text.space()
        if not (yield from text.accept(_BEGIN)):
            break
    yield from text.accept(_ALL_END)


def _call(stream: Stream) -> Wait[None]:
    text = stream.text
    call_id = (yield from text.through(_ARGUMENTS, _LONGEST_ID)).strip()
    name = call_id.rpartition(":")[0] or call_id
    yield from text.space()
    if (yield from text.peek()) != "{":
        raise Malformed
    stream.begin(name.removeprefix("functions."), call_id)
    yield from object_(text, stream.arguments)
    stream.finish()
    yield from text.space()
    yield from text.accept(_END)


FORMAT = Format(
    read,
    markers=(_ALL_BEGIN, _BEGIN),
    in_templates=((_ALL_BEGIN,),),
    inner=(_ALL_END, _ARGUMENTS, _END),
)
