"""How an answer is parsed: reasoning first, then tool calls in what is left.

The server makes one AnswerParser from its flags, and for each answer either calls `whole` or feeds
an AnswerStream.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from .pieces import Parsed, Piece, ToolDelta, join, merge
from .stream import Format, Stream


class AnswerStream:
    """One answer while it arrives; see `Stream` for push and end."""

    def __init__(self, stages: list[Stream], parallel: bool) -> None:
        self._stages = stages
        self._parallel = parallel

    def push(self, delta: str) -> list[Piece]:
        """Pieces that this text makes certain."""
        return self._through([delta], end=False)

    def end(self) -> list[Piece]:
        """Pieces that were held back; the text is over."""
        return self._through([], end=True)

    def _through(self, pieces: list[Piece], end: bool) -> list[Piece]:
        """Passes content from stage to stage; reasoning and calls are final at once."""
        for stage in self._stages:
            passed: list[Piece] = []
            for piece in pieces:
                passed += stage.push(piece) if isinstance(piece, str) else [piece]
            if end:
                passed += stage.end()
            pieces = passed
        return merge(piece for piece in pieces if self._wanted(piece))

    def _wanted(self, piece: Piece) -> bool:
        return self._parallel or not isinstance(piece, ToolDelta) or piece.index == 0


@dataclass(frozen=True)
class AnswerParser:
    """The formats of answers; without any, all text is content.

    parameters: the arguments' JSON schemas by tool name. parallel: False keeps only the first call.
    """

    tools: Format | None = None
    reasoning: Format | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    parallel: bool = True

    def stream(self, prompt: str = "", whole: bool = False) -> AnswerStream:
        """A parser of one answer.

        prompt: its text, or the end of it: templates may open the reasoning there. whole: give a
        call out only when it is complete (see `Stream`).
        """
        stages = []
        if self.reasoning is not None:
            stages.append(Stream(self.reasoning, self.parameters, prompt, whole))
        if self.tools is not None:
            stages.append(Stream(self.tools, self.parameters, prompt, whole))
        return AnswerStream(stages, self.parallel)

    def whole(self, text: str, prompt: str = "") -> Parsed:
        """The parts of a whole answer; a call that is not complete stays content."""
        stream = self.stream(prompt, whole=True)
        return join([*stream.push(text), *stream.end()])

    def needs_special_tokens(self, special_tokens: Collection[str]) -> bool:
        """Whether markers are among the tokenizer's special tokens, so that text must keep them."""
        forms = [form for form in (self.tools, self.reasoning) if form is not None]
        return any(form.is_written_with(token) for form in forms for token in special_tokens)
