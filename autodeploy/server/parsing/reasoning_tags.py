"""Reasoning between an opening and a closing tag, at the beginning of the answer.

Who opened it? The model, the template (then the prompt ends with the opening tag), or nobody:
some models always begin to reason and only say where it ends. White space around the reasoning
and before the content is dropped. Tags that come later are content: the answer may speak of them.
"""

from __future__ import annotations

from .reader import SPACE, Malformed, Wait
from .stream import Format, Stream


def tagged(
    openings: tuple[str, ...],
    closings: tuple[str, ...],
    *,
    opened: bool = False,
    in_templates: tuple[tuple[str, ...], ...] = (),
) -> Format:
    """A format with these tags.

    opened: reasoning has begun even if nobody wrote an opening tag, unless the prompt has closed
    it already.
    """

    def start(stream: Stream) -> Wait[bool]:
        prompt = stream.prompt.rstrip(SPACE)
        begun = prompt.endswith(openings) or (opened and not prompt.endswith(closings))
        yield from stream.text.space()
        for opening in openings:
            if (yield from stream.text.accept(opening)):
                begun = True
        if begun:
            yield from _until(stream, closings)
        return begun

    return Format(_nothing, start=start, in_templates=in_templates, inner=openings + closings)


def _until(stream: Stream, closings: tuple[str, ...]) -> Wait[None]:
    text = stream.text
    yield from text.space()
    while True:
        piece, closing = yield from text.until(closings, trim=True)
        text.forget()
        stream.reasoning(piece)
        if closing is not None:
            yield from text.space()
            text.take(len(closing))
            return
        if text.ended:
            return


def _nothing(stream: Stream, marker: str) -> Wait[None]:
    """Never called: there is no marker."""
    raise Malformed
    yield
