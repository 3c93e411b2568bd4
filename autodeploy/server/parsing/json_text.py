"""JSON while it arrives: checked character by character, and written on as it comes.

`write` is given pieces that together are valid JSON once the value is complete: no piece ends in
the middle of an escape, and line breaks inside strings, which models write and JSON forbids, are
escaped. What JSON has no word for (NaN, a comma too many, single quotes) raises Malformed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

from .reader import Malformed, Reader, Wait

_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_NUMBER_CHARACTERS = re.compile(r"[-+0-9.eE]*")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_SURROGATE = re.compile("[\ud800-\udfff]")
_DEEPEST = 100
_LONGEST_NUMBER = 4000

Write = Callable[[str], None]


def ignore(text: str) -> None:
    """A `write` for values that are only skipped."""


def meaning(text: str) -> Any:
    """What a JSON text means.

    Raises:
        ValueError: it is none, or has numbers that JSON cannot hold.
    """
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large")
    return number


def written(value: Any) -> str:
    """The JSON of a value; characters stay as they are where UTF-8 can hold them."""
    text = json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if _SURROGATE.search(text) else text


def inside_string(text: str) -> str:
    """The text as it stands between a JSON string's quotes."""
    return written(text)[1:-1]


def value(text: Reader, write: Write, depth: int = 0) -> Wait[None]:
    """Reads any JSON value.

    Raises:
        Malformed: at the first wrong character, which stays unread, or at the text's end.
    """
    if depth > _DEEPEST:
        raise Malformed
    first = yield from text.peek()
    if first == "{":
        yield from object_(text, write, depth)
    elif first == "[":
        yield from _array(text, write, depth)
    elif first == '"':
        yield from string(text, write)
    elif first and first in "-0123456789":
        number = yield from text.run(_NUMBER_CHARACTERS, _LONGEST_NUMBER)
        if not _NUMBER.fullmatch(number):
            raise Malformed
        write(number)
    else:
        for word in ("true", "false", "null"):
            if (yield from text.accept(word)):
                write(word)
                return
        raise Malformed


def object_(text: Reader, write: Write, depth: int = 0) -> Wait[None]:
    """Reads an object.

    Raises:
        Malformed: as `value`.
    """
    yield from text.expect("{")
    write("{")
    write((yield from text.space()))
    if (yield from text.accept("}")):
        write("}")
        return
    while True:
        yield from string(text, write)
        yield from _expect(text, write, ":")
        write((yield from text.space()))
        yield from value(text, write, depth + 1)
        write((yield from text.space()))
        if not (yield from text.accept(",")):
            break
        write(",")
        write((yield from text.space()))
    yield from _expect(text, write, "}")


def _array(text: Reader, write: Write, depth: int) -> Wait[None]:
    yield from text.expect("[")
    write("[")
    write((yield from text.space()))
    if (yield from text.accept("]")):
        write("]")
        return
    while True:
        yield from value(text, write, depth + 1)
        write((yield from text.space()))
        if not (yield from text.accept(",")):
            break
        write(",")
        write((yield from text.space()))
    yield from _expect(text, write, "]")


def _expect(text: Reader, write: Write, sign: str) -> Wait[None]:
    write((yield from text.space()))
    yield from text.expect(sign)
    write(sign)


def string(text: Reader, write: Write) -> Wait[None]:
    """Reads a string with its quotes.

    Raises:
        Malformed: as `value`.
    """
    yield from text.expect('"')
    write('"')
    while True:
        there = yield from text.peek()
        if there == "":
            raise Malformed
        if there == '"':
            text.take(1)
            write('"')
            return
        if there == "\\":
            write((yield from _escape(text)))
        elif there < " ":
            write(inside_string(text.take(1)))
        else:
            # What has arrived; there is no need to wait for the string's end.
            write(text.take_while(_PLAIN))


def _escape(text: Reader) -> Wait[str]:
    yield from text.expect("\\")
    kind = yield from text.peek()
    if kind == "" or kind not in '"\\/bfnrtu':
        raise Malformed
    text.take(1)
    if kind != "u":
        return "\\" + kind
    digits = ""
    while len(digits) < 4:
        digit = yield from text.peek()
        if digit == "" or digit not in "0123456789abcdefABCDEF":
            raise Malformed
        digits += text.take(1)
    return "\\u" + digits


def string_value(text: Reader) -> Wait[str]:
    """Reads a string and returns what it means.

    Raises:
        Malformed: as `value`.
    """
    pieces: list[str] = []
    yield from string(text, pieces.append)
    found: str = json.loads("".join(pieces))
    return found
