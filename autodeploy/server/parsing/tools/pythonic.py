"""[f(a=1, b="x"), g()]: a Python list of calls, at the beginning or after <|python_start|>.

Source: Meta's prompt format for its versions 3.2 and 4. Values are Python literals; JSON's true,
false and null are understood, too.
"""

from __future__ import annotations

import re

from .. import python_text
from ..json_text import inside_string
from ..reader import Malformed, Wait
from ..stream import Format, Stream

ALSO = ("llama4_pythonic",)
_NAME = re.compile(r"[\w.-]*")
_KEYWORD = re.compile(r"\w*")


def read(stream: Stream, marker: str) -> Wait[None]:
    """The list, up to the closing marker if there is one."""
    yield from stream.text.space()
    yield from _list(stream)
    yield from stream.text.space()
    yield from stream.text.accept("<|python_end|>")


def start(stream: Stream) -> Wait[bool]:
    """The list without a marker."""
    yield from stream.text.space()
    if (yield from stream.text.peek()) != "[":
        return False
    yield from _list(stream)
    return True


def _list(stream: Stream) -> Wait[None]:
    text = stream.text
    yield from text.expect("[")
    while True:
        yield from text.space()
        yield from call(stream)
        yield from text.space()
        if not (yield from text.accept(",")):
            break
    yield from text.expect("]")


def call(stream: Stream) -> Wait[None]:
    """Reads one call.

    Raises:
        Malformed: it is none, or of a tool that nobody declared.
    """
    text = stream.text
    name = yield from text.run(_NAME, 256)
    if not stream.knows(name):
        raise Malformed
    yield from text.expect("(")
    yield from text.space()
    if (yield from text.accept(")")):
        stream.call(name, "{}")
        return
    # Prose in brackets has no `word=`, so nothing is given out before that.
    keyword = yield from _keyword(stream)
    stream.begin(name)
    stream.arguments("{")
    while True:
        stream.arguments(f'"{inside_string(keyword)}": ')
        yield from python_text.value(text, stream.arguments)
        yield from text.space()
        comma = yield from text.accept(",")
        yield from text.space()
        if (yield from text.accept(")")):
            break
        if not comma:
            raise Malformed
        keyword = yield from _keyword(stream)
        stream.arguments(", ")
    stream.arguments("}")
    stream.finish()


def _keyword(stream: Stream) -> Wait[str]:
    text = stream.text
    word = yield from text.run(_KEYWORD, 256)
    yield from text.space()
    yield from text.expect("=")
    yield from text.space()
    if not word.isidentifier():
        raise Malformed
    return word


FORMAT = Format(
    read,
    markers=("<|python_start|>",),
    start=start,
    in_templates=(("[func_name1(",), ("<|python_start|>",)),
    inner=("<|python_end|>",),
)
