"""The markers of `deepseek_v3` with nothing else around name and arguments.

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>

Source: the published chat template of that version.
"""

from __future__ import annotations

from ..reader import Wait
from ..stream import Format, Stream
from .deepseek_v3 import ALL_BEGIN, ALL_END, BEGIN, END, LONGEST_NAME, SEPARATOR, arguments


def read(stream: Stream, marker: str) -> Wait[None]:
    """Calls up to the end marker; the inner marker alone begins one, too."""
    text = stream.text
    yield from text.space()
    if marker == ALL_BEGIN:
        yield from text.expect(BEGIN)
    while True:
        name = yield from text.through(SEPARATOR, LONGEST_NAME)
        yield from text.space()
        yield from arguments(stream, name.strip())
        yield from text.accept(END)
        yield from text.space()
        if not (yield from text.accept(BEGIN)):
            break
    yield from text.accept(ALL_END)


FORMAT = Format(
    read,
    markers=(ALL_BEGIN, BEGIN),
    in_templates=((ALL_BEGIN,),),
    inner=(ALL_END, SEPARATOR, END),
)
