"""<minimax:tool_call><invoke name="f"><parameter name="a">1</parameter></invoke> and its end tag.

Source: the published chat template.
"""

from __future__ import annotations

from ..bare_calls import Tags, functions
from ..reader import Wait
from ..stream import Format, Stream

_BEGIN, _END = "<minimax:tool_call>", "</minimax:tool_call>"
_TAGS = Tags('<invoke name="', '">', '<parameter name="', '">', "</parameter>", "</invoke>")


def read(stream: Stream, marker: str) -> Wait[None]:
    """One or more functions."""
    yield from stream.text.space()
    yield from functions(stream, _TAGS, _END)


FORMAT = Format(read, (_BEGIN,), in_templates=((_BEGIN,),), inner=(_END,))
