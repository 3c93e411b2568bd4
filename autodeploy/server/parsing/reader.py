"""Text that is still arriving, read as if it were all there.

A format is written once, as straight code that reads from front to back. Where it needs text that
has not come yet it waits, by `yield from`; the stream goes on with it when more text is fed. So a
text cut into any pieces is read as the whole is: no primitive here tells a piece's end from its
middle, only the end of the text is seen.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from functools import cache
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Wait: TypeAlias = Generator[None, None, T]
"""A read that may have to wait for text; `yield from` gives its T."""

SPACE = " \t\r\n"
_LONGEST_SPACE = 64
_SPACE = re.compile(f"[{SPACE}]*")


class Malformed(Exception):
    """The text is not what the format wants here; inside `parsing` only."""


class Reader:
    """A text's unread rest, and what was read since the last `forget`."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._ended = False
        self._read: list[str] = []

    def feed(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        """Nothing will be fed any more."""
        self._ended = True

    @property
    def ended(self) -> bool:
        return self._ended

    def take(self, count: int) -> str:
        """Reads `count` characters that have arrived."""
        piece = self._text[self._at : self._at + count]
        self._at += count
        self._read.append(piece)
        return piece

    def forget(self) -> str:
        """What was read since the last time."""
        text = "".join(self._read)
        self._read.clear()
        return text

    def rewind(self) -> None:
        """What was read since the last `forget` is unread again."""
        self._text = self.forget() + self._text[self._at :]
        self._at = 0

    def take_while(self, pattern: re.Pattern[str]) -> str:
        """Reads what has arrived of a class of characters; pattern: that class, starred."""
        found = pattern.match(self._text, self._at)
        return self.take(found.end() - self._at) if found is not None else ""

    def peek(self) -> Wait[str]:
        """The next character; '' at the end."""
        while self._at == len(self._text) and not self._ended:
            yield
        return self._text[self._at : self._at + 1]

    def accept(self, literal: str) -> Wait[bool]:
        """Reads the literal if it comes next."""
        if self._text.startswith(literal, self._at):
            self.take(len(literal))
            return True
        while True:
            there = self._text[self._at : self._at + len(literal)]
            if there == literal:
                self.take(len(literal))
                return True
            if self._ended or not literal.startswith(there):
                return False
            yield

    def expect(self, literal: str) -> Wait[None]:
        """Reads the literal.

        Raises:
            Malformed: something else comes.
        """
        if not (yield from self.accept(literal)):
            raise Malformed

    def run(self, pattern: re.Pattern[str], limit: int | None = None) -> Wait[str]:
        """Reads as many characters of a class as come; pattern: that class, starred.

        Raises:
            Malformed: there are more than `limit`.
        """
        pieces: list[str] = []
        length = 0
        while True:
            found = pattern.match(self._text, self._at)
            count = found.end() - self._at if found is not None else 0
            if limit is not None:
                # Exactly one too many is read, however much has arrived.
                count = min(count, limit + 1 - length)
            if count:
                length += count
                pieces.append(self.take(count))
            if limit is not None and length > limit:
                raise Malformed
            if self._at < len(self._text) or self._ended:
                return "".join(pieces)
            yield

    def space(self) -> Wait[str]:
        if self._at < len(self._text) and self._text[self._at] not in SPACE:
            return ""
        return (yield from self.run(_SPACE))

    def until(self, literals: tuple[str, ...], trim: bool = False) -> Wait[tuple[str, str | None]]:
        """Reads what certainly stands before the first of the literals, at least something.

        Returns it, and the literal if it has arrived: None means go on, or at the end that none
        comes. trim: white space before a literal stays unread with it, but for a very long one.
        """
        pattern = _any_of(literals)
        while True:
            found = pattern.search(self._text, self._at)
            if found is not None:
                before = self._text[self._at : found.start()]
                return self.take(_trimmed(before) if trim else len(before)), found.group()
            there = self._text[self._at :]
            if self._ended:
                return self.take(len(there)), None
            certain = len(there) - held_back(there, literals)
            if trim:
                certain = _trimmed(there[:certain])
            if certain:
                return self.take(certain), None
            yield

    def through(self, literal: str, limit: int | None = None) -> Wait[str]:
        """Reads up to and with a literal; returns what stands before it.

        Raises:
            Malformed: it does not come, or not within `limit` characters.
        """
        searched = 0
        while True:
            # No further than it may stand: what is read by trial must not cost the whole text.
            last = None if limit is None else self._at + limit + len(literal)
            at = self._text.find(literal, self._at + searched, last)
            # Before the literal, or before the first place where it may still begin.
            length = (at if at >= 0 else len(self._text) - len(literal) + 1) - self._at
            if limit is not None and length > limit:
                raise Malformed
            if at >= 0:
                before = self.take(length)
                self.take(len(literal))
                return before
            if self._ended:
                raise Malformed
            searched = max(0, length)
            yield


@cache
def _any_of(literals: tuple[str, ...]) -> re.Pattern[str]:
    # Without literals, what never matches.
    return re.compile("|".join(map(re.escape, literals)) or r"(?!)")


def _trimmed(text: str) -> int:
    """Length without the white space at the end, of which no more than so much is held back."""
    return max(len(text.rstrip(SPACE)), len(text) - _LONGEST_SPACE)


def held_back(text: str, literals: tuple[str, ...]) -> int:
    """Characters at the end of `text` that may be the beginning of one of the literals."""
    most = 0
    for word in literals:
        at = text.find(word[0], max(0, len(text) - len(word) + 1))
        while at >= 0:
            if word.startswith(text[at:]):
                most = max(most, len(text) - at)
                break
            at = text.find(word[0], at + 1)
    return most
