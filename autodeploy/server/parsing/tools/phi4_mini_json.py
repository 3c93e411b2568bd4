"""functools[{"name": "f", "arguments": {"a": 1}}]. Source: vLLM's template for this family."""

from __future__ import annotations

from .. import call_object
from ..reader import Wait
from ..stream import Format, Stream


def read(stream: Stream, marker: str) -> Wait[None]:
    """A list of objects; its bracket is a part of the marker."""
    text = stream.text
    while True:
        yield from text.space()
        yield from call_object.call(stream, marked=True)
        yield from text.space()
        if not (yield from text.accept(",")):
            break
    yield from text.accept("]")


FORMAT = Format(read, markers=("functools[",), in_templates=(("functools[",),))
