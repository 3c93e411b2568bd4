"""<tool_call><function=f><parameter=a>1</parameter></function></tool_call>, with bare values.

The outer tag may be missing, which happens after some content. Source: the published templates.
"""

from __future__ import annotations

from ..bare_calls import Tags, function, functions
from ..reader import Wait
from ..stream import Format, Stream

ALSO = ("qwen3_xml",)
TAGS = Tags("<function=", ">", "<parameter=", ">", "</parameter>", "</function>", breaks=True)
_END = "</tool_call>"


def read(stream: Stream, marker: str) -> Wait[None]:
    """One or more functions."""
    yield from stream.text.space()
    if marker == TAGS.function:
        yield from function(stream, TAGS)
        yield from stream.text.space()
        yield from stream.text.accept(_END)
    else:
        yield from functions(stream, TAGS, _END)


FORMAT = Format(
    read,
    markers=("<tool_call>", TAGS.function),
    in_templates=((TAGS.function, TAGS.parameter),),
    inner=(_END, TAGS.function_end, TAGS.value_end),
)
