"""<seed:tool_call> around the functions of `qwen3_coder`. Source: the published chat template."""

from __future__ import annotations

from ..bare_calls import functions
from ..reader import Wait
from ..stream import Format, Stream
from .qwen3_coder import TAGS

_BEGIN, _END = "<seed:tool_call>", "</seed:tool_call>"


def read(stream: Stream, marker: str) -> Wait[None]:
    """One or more functions."""
    yield from stream.text.space()
    yield from functions(stream, TAGS, _END)


FORMAT = Format(
    read, (_BEGIN,), in_templates=((_BEGIN, TAGS.function, TAGS.parameter),), inner=(_END,)
)
