"""Python literals while they arrive, written on as JSON."""

from __future__ import annotations

import ast
import re

from .json_text import Write, inside_string, written
from .reader import Malformed, Reader, Wait

_NUMBER_CHARACTERS = re.compile(r"[-+0-9.eE_]*")
_NUMBER = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_WORDS = {"True": "true", "False": "false", "None": "null"} | {
    word: word for word in ("true", "false", "null")
}
_SIMPLE = {
    "\\": "\\", "'": "'", '"': '"', "n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f",
    "a": "\a", "v": "\v", "0": "\0", "\n": "",
}  # fmt: skip
_DIGITS = {"x": 2, "u": 4, "U": 8}
_INSIDE = {"'": re.compile(r"[^'\\]*"), '"': re.compile(r'[^"\\]*')}
_DEEPEST = 100
_LONGEST_NUMBER = 400


def value(text: Reader, write: Write, depth: int = 0) -> Wait[None]:
    """Reads a string, number, True, False, None, list, tuple or dict with string keys.

    Raises:
        Malformed: at the first wrong character, or at the text's end.
    """
    if depth > _DEEPEST:
        raise Malformed
    first = yield from text.peek()
    if first in ("'", '"'):
        yield from string(text, write)
    elif first == "[":
        yield from _list(text, write, depth, "[", "]")
    elif first == "(":
        yield from _list(text, write, depth, "(", ")")
    elif first == "{":
        yield from _dict(text, write, depth)
    elif first and first in "-+.0123456789":
        write(_number((yield from text.run(_NUMBER_CHARACTERS, _LONGEST_NUMBER))))
    else:
        for word, meaning in _WORDS.items():
            if (yield from text.accept(word)):
                write(meaning)
                return
        raise Malformed


def string(text: Reader, write: Write) -> Wait[None]:
    """Reads a string in single or double quotes; writes it as a JSON string.

    Raises:
        Malformed: as `value`.
    """
    quote = yield from text.peek()
    if quote not in _INSIDE:
        raise Malformed
    text.take(1)
    write('"')
    while not (yield from text.accept(quote)):
        if (yield from text.peek()) == "":
            raise Malformed
        if (yield from text.accept("\\")):
            write(inside_string((yield from _escape(text))))
        else:
            write(inside_string(text.take_while(_INSIDE[quote])))
    write('"')


def _escape(text: Reader) -> Wait[str]:
    kind = yield from text.peek()
    if kind == "":
        raise Malformed
    text.take(1)
    if kind not in _DIGITS:
        # As Python reads it: what is no escape is the backslash itself.
        return _SIMPLE.get(kind, "\\" + kind)
    digits = ""
    while len(digits) < _DIGITS[kind]:
        digit = yield from text.peek()
        if digit == "" or digit not in "0123456789abcdefABCDEF":
            raise Malformed
        digits += text.take(1)
    if int(digits, 16) > 0x10FFFF:
        raise Malformed
    return chr(int(digits, 16))


def _number(text: str) -> str:
    if not _NUMBER.fullmatch(text):
        raise Malformed
    try:
        number = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise Malformed from None
    if number in (float("inf"), float("-inf")):
        raise Malformed
    return written(number)


def _list(text: Reader, write: Write, depth: int, opening: str, closing: str) -> Wait[None]:
    yield from text.expect(opening)
    write("[")
    first = True
    yield from text.space()
    while not (yield from text.accept(closing)):
        if not first:
            yield from text.expect(",")
            yield from text.space()
            if (yield from text.accept(closing)):
                break
            write(", ")
        yield from value(text, write, depth + 1)
        yield from text.space()
        first = False
    write("]")


def _dict(text: Reader, write: Write, depth: int) -> Wait[None]:
    yield from text.expect("{")
    write("{")
    first = True
    yield from text.space()
    while not (yield from text.accept("}")):
        if not first:
            yield from text.expect(",")
            yield from text.space()
            if (yield from text.accept("}")):
                break
            write(", ")
        yield from string(text, write)
        yield from text.space()
        yield from text.expect(":")
        yield from text.space()
        write(": ")
        yield from value(text, write, depth + 1)
        yield from text.space()
        first = False
    write("}")
