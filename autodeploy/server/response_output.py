"""The text of a sequence becomes output items of a response, and the events that tell of them.

Events are plain dicts without their number: the hot path of a stream, and their names say what
they are. Each item opens, grows and closes before the next one opens.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from .parsing import Piece, Reasoning, ToolDelta

Fields = dict[str, Any]


class OutputWriter:
    """Collects the items of one response, and yields what a stream would say meanwhile."""

    def __init__(self) -> None:
        self.items: list[Fields] = []
        self._open: _Item | None = None
        self._logprobs: list[Any] = []
        """Of tokens whose text is not out yet."""

    def add(self, pieces: Iterable[Piece], logprobs: Iterable[Any] = ()) -> Iterator[Fields]:
        """Takes in pieces, and the log probabilities of the tokens they were made of."""
        self._logprobs += logprobs
        for piece in pieces:
            kind = _KINDS[type(piece)]
            begins = isinstance(piece, ToolDelta) and piece.name is not None
            if self._open is None or begins or not isinstance(self._open, kind):
                yield from self._close("completed")
                yield from self._begin(kind(piece))
            assert self._open is not None
            known, self._logprobs = self._logprobs, []
            yield from self._open.grow(piece, known)

    def end(self, complete: bool) -> Iterator[Fields]:
        """Closes the last item. complete: the model ended by itself, not at a limit."""
        if not self.items:
            yield from self._begin(_Message(""))
        yield from self._close("completed" if complete else "incomplete")

    @property
    def reasoning(self) -> str:
        """All reasoning so far, of items that have ended."""
        items = (item for item in self.items if item["type"] == "reasoning")
        return "".join(part["text"] for item in items for part in item["content"])

    def _begin(self, item: _Item) -> Iterator[Fields]:
        item.index = len(self.items)
        self.items.append(item.fields)
        self._open = item
        yield {
            "type": "response.output_item.added", "output_index": item.index, "item": item.fields,
        }  # fmt: skip
        yield from item.begin()

    def _close(self, status: str) -> Iterator[Fields]:
        item, self._open = self._open, None
        if item is None:
            return
        yield from item.end()
        item.fields["status"] = status
        yield {
            "type": "response.output_item.done", "output_index": item.index, "item": item.fields,
        }  # fmt: skip


class _Item:
    """An output item that grows. fields: what it is so far."""

    fields: Fields

    def __init__(self) -> None:
        self.index = 0
        self.texts: list[str] = []

    def begin(self) -> Iterator[Fields]:
        """Events after the one that adds it."""
        yield from ()

    def grow(self, piece: Any, logprobs: list[Any]) -> Iterator[Fields]:
        """Takes in a piece of its kind."""
        raise NotImplementedError

    def end(self) -> Iterator[Fields]:
        """Events before the one that ends it; then `fields` are complete."""
        raise NotImplementedError

    def event(self, kind: str, **fields: Any) -> Fields:
        return {"type": kind, "item_id": self.fields["id"], "output_index": self.index, **fields}

    def part_event(self, kind: str, **fields: Any) -> Fields:
        return self.event(kind, content_index=0, **fields)


class _Message(_Item):
    def __init__(self, piece: str) -> None:
        super().__init__()
        self.fields = {
            "id": _name("msg"), "type": "message", "status": "in_progress", "role": "assistant",
            "content": [],
        }  # fmt: skip
        self._logprobs: list[Any] = []

    def begin(self) -> Iterator[Fields]:
        yield self.part_event("response.content_part.added", part=self._part())

    def grow(self, piece: Any, logprobs: list[Any]) -> Iterator[Fields]:
        self.texts.append(piece)
        self._logprobs += logprobs
        yield self.part_event("response.output_text.delta", delta=piece, logprobs=logprobs)

    def end(self) -> Iterator[Fields]:
        part = self._part()
        yield self.part_event(
            "response.output_text.done", text=part["text"], logprobs=part["logprobs"]
        )
        yield self.part_event("response.content_part.done", part=part)
        self.fields["content"] = [part]

    def _part(self) -> Fields:
        text = "".join(self.texts)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs}


class _Thought(_Item):
    def __init__(self, piece: Reasoning) -> None:
        super().__init__()
        self.fields = {
            "id": _name("rs"), "type": "reasoning", "status": "in_progress", "summary": [],
            "content": [], "encrypted_content": None,
        }  # fmt: skip

    def begin(self) -> Iterator[Fields]:
        yield self.part_event("response.content_part.added", part=self._part())

    def grow(self, piece: Any, logprobs: list[Any]) -> Iterator[Fields]:
        self.texts.append(piece.text)
        yield self.part_event("response.reasoning_text.delta", delta=piece.text)

    def end(self) -> Iterator[Fields]:
        part = self._part()
        yield self.part_event("response.reasoning_text.done", text=part["text"])
        yield self.part_event("response.content_part.done", part=part)
        self.fields["content"] = [part]

    def _part(self) -> Fields:
        return {"type": "reasoning_text", "text": "".join(self.texts)}


class _Call(_Item):
    def __init__(self, piece: ToolDelta) -> None:
        super().__init__()
        self.fields = {
            "id": _name("fc"), "type": "function_call", "status": "in_progress",
            "call_id": piece.id, "name": piece.name, "arguments": "",
        }  # fmt: skip

    def grow(self, piece: Any, logprobs: list[Any]) -> Iterator[Fields]:
        if piece.arguments:
            self.texts.append(piece.arguments)
            yield self.event("response.function_call_arguments.delta", delta=piece.arguments)

    def end(self) -> Iterator[Fields]:
        arguments = "".join(self.texts)
        yield self.event(
            "response.function_call_arguments.done", name=self.fields["name"], arguments=arguments
        )
        self.fields["arguments"] = arguments


_KINDS: dict[type, Any] = {str: _Message, Reasoning: _Thought, ToolDelta: _Call}


def _name(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
