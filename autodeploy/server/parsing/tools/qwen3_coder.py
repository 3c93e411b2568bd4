"""<tool_call><function=f><parameter=a>1</parameter></function></tool_call>, with bare values.

A value is text without quotes; the tool's schema says what it means. One line break after the
opening tag and one before the closing tag belong to the tags. The outer tag may be missing, which
happens after some content. Source: the published chat templates.
"""

from __future__ import annotations

from .. import bare_values
from ..json_text import inside_string
from ..reader import Malformed, Wait
from ..stream import Format, Stream

ALSO = ("qwen3_xml",)
_FUNCTION, _PARAMETER = "<function=", "<parameter="
_LONGEST_NAME = 256
_CLOSING = "</parameter>"


def read(stream: Stream, marker: str) -> Wait[None]:
    """One or more functions."""
    text = stream.text
    if marker != _FUNCTION:
        yield from text.space()
        yield from text.expect(_FUNCTION)
    while True:
        yield from _function(stream)
        yield from text.space()
        if not (yield from text.accept(_FUNCTION)):
            break
    yield from text.accept("</tool_call>")


def _function(stream: Stream) -> Wait[None]:
    text = stream.text
    name = (yield from text.through(">", _LONGEST_NAME)).strip()
    yield from text.space()
    parameters = 0
    while (yield from text.accept(_PARAMETER)):
        key = (yield from text.through(">", _LONGEST_NAME)).strip()
        if parameters == 0:
            stream.begin(name)
        stream.arguments(f'{", " if parameters else "{"}"{inside_string(key)}": ')
        yield from _value(stream, bare_values.types_of(stream.parameters.get(name), key))
        yield from text.space()
        parameters += 1
    if parameters == 0:
        yield from text.expect("</function>")
        stream.call(name, "{}")
        return
    # A call whose last value is closed has all it needs.
    stream.arguments("}")
    stream.finish()
    yield from text.accept("</function>")


def _value(stream: Stream, types: frozenset[str]) -> Wait[None]:
    text = stream.text
    if types and types != {"string"}:
        value = yield from text.through(_CLOSING)
        stream.arguments(bare_values.typed(_without_breaks(value), types))
        return
    yield from text.accept("\n")
    stream.arguments('"')
    while True:
        # The line break before the closing tag is a part of that.
        piece, closing = yield from text.until(("\n" + _CLOSING, _CLOSING))
        stream.arguments(inside_string(piece))
        if closing is not None:
            text.take(len(closing))
            stream.arguments('"')
            return
        if text.ended:
            raise Malformed


def _without_breaks(value: str) -> str:
    return value.removeprefix("\n").removesuffix("\n")


FORMAT = Format(
    read,
    markers=("<tool_call>", _FUNCTION),
    in_templates=(("<function=", "<parameter="),),
    inner=("</tool_call>", "</function>", _CLOSING),
)
