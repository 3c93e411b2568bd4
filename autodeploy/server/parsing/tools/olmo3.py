"""<function_calls>, then f(a=1) on a line for each call, </function_calls>.

Source: the published chat template. Values are read as in `pythonic`.
"""

from __future__ import annotations

from ..reader import Wait
from ..stream import Format, Stream
from .pythonic import call

_BEGIN, _END = "<function_calls>", "</function_calls>"


def read(stream: Stream, marker: str) -> Wait[None]:
    """Calls up to the end tag."""
    yield from stream.text.space()
    yield from call(stream)
    yield from stream.text.space()
    while (yield from stream.text.peek()) not in ("", "<"):
        yield from call(stream)
        yield from stream.text.space()
    yield from stream.text.accept(_END)


FORMAT = Format(read, (_BEGIN,), in_templates=((_BEGIN,),), inner=(_END,))
