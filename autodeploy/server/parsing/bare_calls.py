"""Calls whose arguments stand between tags, without quotes: what several formats have in common.

A value is text as it is; the tool's schema says what it means (see `bare_values`). Values that are
strings are given out as they arrive, others when they are complete.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import bare_values
from .json_text import inside_string
from .reader import Malformed, Wait
from .stream import Stream

LONGEST_NAME = 256


@dataclass(frozen=True)
class Tags:
    """function NAME name_end, then parameter KEY key_end VALUE value_end..., then function_end.

    breaks: one line break after key_end and one before value_end belong to the tags.
    """

    function: str
    name_end: str
    parameter: str
    key_end: str
    value_end: str
    function_end: str
    breaks: bool = False


def functions(stream: Stream, tags: Tags, end: str) -> Wait[None]:
    """Reads one or more functions and the outer `end` tag, which may be missing.

    Raises:
        Malformed: none comes, or one is not closed.
    """
    text = stream.text
    yield from text.expect(tags.function)
    yield from function(stream, tags)
    yield from text.space()
    while (yield from text.accept(tags.function)):
        yield from function(stream, tags)
        yield from text.space()
    yield from text.accept(end)


def function(stream: Stream, tags: Tags) -> Wait[None]:
    """Reads a function after its first tag.

    Raises:
        Malformed: it does not follow the tags.
    """
    text = stream.text
    name = (yield from text.through(tags.name_end, LONGEST_NAME)).strip()
    yield from text.space()
    parameters = 0
    while (yield from text.accept(tags.parameter)):
        key = (yield from text.through(tags.key_end, LONGEST_NAME)).strip()
        if parameters == 0:
            stream.begin(name)
        yield from member(stream, name, key, parameters == 0, tags.value_end, tags.breaks)
        yield from text.space()
        parameters += 1
    if parameters == 0:
        yield from text.expect(tags.function_end)
        stream.call(name, "{}")
        return
    # A call whose last value is closed has all it needs.
    stream.arguments("}")
    stream.finish()
    yield from text.accept(tags.function_end)


def member(
    stream: Stream, name: str, key: str, first: bool, closing: str, breaks: bool
) -> Wait[None]:
    """Reads a value up to its closing tag, and writes key and value as a member of an object.

    Raises:
        Malformed: the tag does not come.
    """
    text = stream.text
    stream.arguments(f'{"{" if first else ", "}"{inside_string(key)}": ')
    types = bare_values.types_of(stream.parameters.get(name), key)
    if types and types != {"string"}:
        value = yield from text.through(closing)
        if breaks:
            value = value.removeprefix("\n").removesuffix("\n")
        stream.arguments(bare_values.typed(value, types))
        return
    closings = ("\n" + closing, closing) if breaks else (closing,)
    if breaks:
        yield from text.accept("\n")
    stream.arguments('"')
    while True:
        piece, found = yield from text.until(closings)
        stream.arguments(inside_string(piece))
        if found is not None:
            text.take(len(found))
            stream.arguments('"')
            return
        if text.ended:
            raise Malformed
