"""One answer while it arrives: a format's reading of it, turned into pieces for the client.

A format says which markers begin something that is not content (`markers`), and reads what follows
one (`after`). Around it, for all formats alike: content is given out as soon as it cannot be a
marker's beginning any more, white space before a call is dropped, and what a format cannot read
(it raises Malformed) is content.

Once a call's name is out it cannot be taken back. If its arguments stop being JSON later, the call
ends there and the text from there on is content. A stream that is `whole` gives each call out only
when it is complete, so that such a call is content from its marker on.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .pieces import Piece, Reasoning, ToolDelta, merge
from .reader import Malformed, Reader, Wait


@dataclass(frozen=True)
class Format:
    """How one kind of answer is written; one in each file of `tools` and `reasoning`.

    markers: begin what is not content; none is the beginning of another. after: reads what follows
    a marker; what it raises Malformed for is content. start: reads what may stand at the very
    beginning without a marker; False if nothing does. in_templates: alternatives; a chat template
    that has all strings of one speaks this format. inner: what the format is written with besides
    its markers, which must not be skipped as special tokens.
    """

    after: Callable[[Stream, str], Wait[None]]
    markers: tuple[str, ...] = ()
    start: Callable[[Stream], Wait[bool]] | None = None
    in_templates: tuple[tuple[str, ...], ...] = ()
    inner: tuple[str, ...] = ()

    def is_written_with(self, token: str) -> bool:
        """Whether this token is, or is a part of, what the format is read by."""
        return bool(token) and any(token in word for word in (*self.markers, *self.inner))


def openai_call_id() -> str:
    """A call's id as OpenAI's API makes them."""
    return f"call_{secrets.token_hex(12)}"


class Stream:
    """One answer's pieces. Feed it by `push`, then `end` it; neither ever raises for its text.

    parameters: the JSON schemas of the arguments by tool name; formats that write values as bare
    text need their types, and formats without markers take only these names. prompt: its end, for
    templates that open the reasoning themselves.
    """

    def __init__(
        self,
        form: Format,
        parameters: Mapping[str, Any] | None = None,
        prompt: str = "",
        whole: bool = False,
    ) -> None:
        self.text = Reader()
        self.parameters = parameters or {}
        self.prompt = prompt
        self._form = form
        self._whole = whole
        self._out: list[Piece] = []
        self._calls = 0
        self._call: list[Piece] | None = None
        self._reading = self._read()
        self._step()

    def push(self, delta: str) -> list[Piece]:
        """What this text makes certain."""
        self.text.feed(delta)
        return self._step()

    def end(self) -> list[Piece]:
        """What was held back; the text is over."""
        self.text.end()
        return self._step()

    # For formats.

    def content(self, text: str) -> None:
        """Gives text out as content."""
        self._out.append(text)

    def reasoning(self, text: str) -> None:
        """Gives text out as reasoning."""
        if text:
            self._out.append(Reasoning(text))

    def begin(self, name: str, call_id: str | None = None) -> None:
        """A call begins; its arguments follow.

        Raises:
            Malformed: no function can have this name.
        """
        if not name or not name.isprintable() or name != name.strip():
            raise Malformed
        self._call = [ToolDelta(self._calls, call_id or openai_call_id(), name)]
        self._calls += 1
        self._give_out()

    def arguments(self, text: str) -> None:
        """A piece of the arguments' JSON."""
        assert self._call is not None, "a format wrote arguments outside a call"
        if not text:
            return
        self._call.append(ToolDelta(self._calls - 1, arguments=text))
        self._give_out()

    def finish(self) -> None:
        """The call is complete: what was read so far is represented."""
        assert self._call is not None, "a format finished a call that it never began"
        self._out += self._call
        self._call = None
        self.text.forget()

    def call(self, name: str, arguments: str, call_id: str | None = None) -> None:
        """A whole call at once."""
        self.begin(name, call_id)
        self.arguments(arguments)
        self.finish()

    @property
    def calls(self) -> int:
        """Calls that have begun."""
        return self._calls

    def knows(self, name: str) -> bool:
        """Whether this may be a tool: any name may, if none were declared."""
        return not self.parameters or name in self.parameters

    # What all formats share.

    def _step(self) -> list[Piece]:
        next(self._reading, None)
        pieces, self._out = merge(self._out), []
        return pieces

    def _read(self) -> Wait[None]:
        yield from self._at_start()
        while (marker := (yield from self._content())) is not None:
            calls = self._calls
            try:
                yield from self._form.after(self, marker)
            except Malformed:
                self._give_back()
            else:
                self.text.forget()
            if self._calls > calls:
                yield from self.text.space()
                self.text.forget()

    def _at_start(self) -> Wait[None]:
        if self._form.start is None:
            return
        try:
            if not (yield from self._form.start(self)):
                self.text.rewind()
                return
        except Malformed:
            self._give_back()
            return
        yield from self.text.space()
        self.text.forget()

    def _content(self) -> Wait[str | None]:
        """Gives out text up to a marker, and reads the marker; None at the end."""
        text = self.text
        while True:
            piece, marker = yield from text.until(self._form.markers, trim=True)
            text.forget()
            self.content(piece)
            if marker is not None:
                # The white space goes with the marker: dropped, or given back.
                yield from text.space()
                return text.take(len(marker))
            if text.ended:
                return None

    def _give_out(self) -> None:
        if not self._whole and self._call:
            self._out += self._call
            self._call.clear()
            # Represented: it is not to be given back.
            self.text.forget()

    def _give_back(self) -> None:
        if self._whole and self._call:
            self._calls -= 1
        self._call = None
        self.content(self.text.forget())
