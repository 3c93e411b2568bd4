"""Calls between full-width markers, with a name and a fenced JSON block.

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f
    ```json
    {"a": 1}
    ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

Source: the published chat template of that version.
"""

from __future__ import annotations

from ..json_text import object_
from ..reader import Malformed, Wait
from ..stream import Format, Stream

ALL_BEGIN, ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
BEGIN, SEPARATOR, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
LONGEST_NAME = 256


def read(stream: Stream, marker: str) -> Wait[None]:
    """Calls up to the end marker; the inner marker alone begins one, too."""
    text = stream.text
    yield from text.space()
    if marker == ALL_BEGIN:
        yield from text.expect(BEGIN)
    while True:
        yield from _call(stream)
        yield from text.space()
        if not (yield from text.accept(BEGIN)):
            break
    yield from text.accept(ALL_END)


def _call(stream: Stream) -> Wait[None]:
    text = stream.text
    kind = yield from text.through(SEPARATOR, LONGEST_NAME)
    if kind.strip() != "function":
        raise Malformed
    name = yield from text.through("\n", LONGEST_NAME)
    yield from text.space()
    yield from text.accept("```json")
    yield from text.space()
    yield from arguments(stream, name.strip())
    yield from text.accept("```")
    yield from text.space()
    yield from text.accept(END)


def arguments(stream: Stream, name: str) -> Wait[None]:
    """Reads a call's arguments, which come next, and the space after them."""
    if (yield from stream.text.peek()) != "{":
        raise Malformed
    stream.begin(name)
    yield from object_(stream.text, stream.arguments)
    stream.finish()
    yield from stream.text.space()


FORMAT = Format(
    read,
    markers=(ALL_BEGIN, BEGIN),
    in_templates=((ALL_BEGIN, "```json"),),
    inner=(ALL_END, SEPARATOR, END),
)
