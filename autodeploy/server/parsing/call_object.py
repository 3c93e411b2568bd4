"""Calls written as JSON objects: {"name": ..., "arguments": {...}}, alone or in a list.

What many formats have between their markers. `parameters` stands for `arguments` in some, and a
name may come after its arguments, which then wait for it.
"""

from __future__ import annotations

from collections.abc import Callable

from .json_text import ignore, meaning, object_, string_value, value, written
from .reader import Malformed, Wait
from .stream import Stream

_ARGUMENTS = ("arguments", "parameters")
_LESS = ("type", "id")
NewId = Callable[[], str]


def calls(stream: Stream, marked: bool, new_id: NewId | None = None) -> Wait[None]:
    """Reads an object or a list of them.

    marked: a marker said that this is a call, so a missing `arguments` means none, and other keys
    are skipped. Otherwise it could be any JSON, and only known names and keys make it a call.

    Raises:
        Malformed: something else comes, or a list with nothing in it.
    """
    text = stream.text
    if not (yield from text.accept("[")):
        yield from call(stream, marked, new_id)
        return
    while True:
        yield from text.space()
        yield from call(stream, marked, new_id)
        yield from text.space()
        if not (yield from text.accept(",")):
            break
    yield from text.accept("]")


def call(
    stream: Stream, marked: bool, new_id: NewId | None = None, inner: bool = False
) -> Wait[None]:
    """Reads one object. The call is complete with its arguments, whatever follows.

    inner: it is the `function` of another, as in OpenAI's own shape, and has none itself.

    Raises:
        Malformed: it is not a call.
    """
    before = stream.calls
    name, arguments = yield from _members(stream, marked, new_id, inner)
    if stream.calls > before:
        return
    if name is None or (arguments is None and not marked):
        raise Malformed
    stream.call(name, "{}" if arguments is None else arguments, new_id and new_id())


def _members(
    stream: Stream, marked: bool, new_id: NewId | None, inner: bool
) -> Wait[tuple[str | None, str | None]]:
    """Reads an object's members; gives the call out as soon as it can."""
    text = stream.text
    name: str | None = None
    arguments: str | None = None
    called = False
    yield from text.expect("{")
    yield from text.space()
    while not (yield from text.accept("}")):
        key = yield from string_value(text)
        yield from text.space()
        yield from text.expect(":")
        yield from text.space()
        nested = key == "function" and not inner and (yield from text.peek()) == "{"
        if called or (marked and key not in ("name", "function", *_ARGUMENTS)) or key in _LESS:
            yield from value(text, ignore)
        elif nested:
            yield from call(stream, marked, new_id, inner=True)
            called = True
        elif key in ("name", "function") and name is None:
            name = yield from string_value(text)
            if not marked and not stream.knows(name):
                raise Malformed
        elif key in _ARGUMENTS and arguments is None:
            arguments = yield from _arguments(stream, name, new_id)
            called = arguments is None
        else:
            raise Malformed
        if not called and name is not None and arguments is not None:
            stream.call(name, arguments, new_id and new_id())
            called = True
        yield from text.space()
        if not (yield from text.accept(",")):
            yield from _close(stream, called)
            break
        yield from text.space()
    return name, arguments


def _close(stream: Stream, called: bool) -> Wait[None]:
    # Models forget the last brace now and then; the call is complete without.
    if not (yield from stream.text.accept("}")) and not called:
        raise Malformed


def _arguments(stream: Stream, name: str | None, new_id: NewId | None) -> Wait[str | None]:
    """Reads the arguments; None if they were given out, since the name is known."""
    text = stream.text
    if (yield from text.peek()) == '"':
        return _unquoted((yield from string_value(text)))
    if name is None:
        pieces: list[str] = []
        yield from object_(text, pieces.append)
        return "".join(pieces)
    if (yield from text.peek()) != "{":
        raise Malformed
    stream.begin(name, new_id and new_id())
    yield from object_(text, stream.arguments)
    stream.finish()
    return None


def _unquoted(text: str) -> str:
    """Arguments that were written as a string of JSON."""
    try:
        found = meaning(text)
    except ValueError:
        raise Malformed from None
    if not isinstance(found, dict):
        raise Malformed
    return written(found)
