"""OutputStream: one request's outputs on their way from the engine's thread to an event loop.

A thread that calls `call_soon_threadsafe` for every output wakes the loop as often; `hand_out` does
it once for all that a step of the engine had to say. A reader that lags behind finds its outputs
joined into one, so it catches up, and no queue grows.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Literal

from .active_request import ActiveRequest
from .errors import AutodeployError
from .outputs import CompletionOutput, RequestOutput

OutputKind = Literal["delta", "cumulative", "final"]
Item = RequestOutput | AutodeployError


class OutputStream:
    """A request's outputs; made and read on one event loop."""

    def __init__(self, active: ActiveRequest, kind: OutputKind, tokens: int = 0) -> None:
        self.active = active
        self.kind = kind
        self.tokens = tokens
        """That its sequences have: their prompts, and what has come out."""
        self.loop = asyncio.get_running_loop()
        self._outputs: list[RequestOutput] = []
        self._error: AutodeployError | None = None
        self._reader: asyncio.Future[None] | None = None

    async def next(self) -> RequestOutput:
        """What has come since the last call; waits for the first of it.

        Raises:
            AutodeployError: the request failed; what came before is given out first.
        """
        if not self._outputs and self._error is None:
            self._reader = self.loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        if not self._outputs:
            assert self._error is not None
            raise self._error
        outputs, self._outputs = self._outputs, []
        # Each snapshot has all that those before it had.
        return joined(outputs) if self.kind == "delta" else outputs[-1]

    def take(self, item: Item) -> None:
        """One more; on the event loop."""
        if isinstance(item, AutodeployError):
            self._error = item
        else:
            self._outputs.append(item)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def hand_out(items: Iterable[tuple[OutputStream, Item]]) -> None:
    """Gives streams their items, each on its own event loop; from any thread."""
    of_loops: dict[asyncio.AbstractEventLoop, list[tuple[OutputStream, Item]]] = {}
    for stream, item in items:
        of_loops.setdefault(stream.loop, []).append((stream, item))
    for loop, own in of_loops.items():
        # A closed loop has nobody left to tell.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_take_all, own)


def _take_all(items: list[tuple[OutputStream, Item]]) -> None:
    for stream, item in items:
        stream.take(item)


def joined(deltas: list[RequestOutput]) -> RequestOutput:
    """Deltas of one request, one after the other, as the one that they come to."""
    if len(deltas) == 1:
        return deltas[0]
    parts: dict[int, CompletionOutput] = {}
    for delta in deltas:
        for part in delta.outputs:
            if part.index in parts:
                _extend(parts[part.index], part)
            else:
                parts[part.index] = part
    last = deltas[-1]
    last.outputs = [parts[index] for index in sorted(parts)]
    return last


def _extend(part: CompletionOutput, more: CompletionOutput) -> None:
    part.text += more.text
    part.token_ids += more.token_ids
    part.cumulative_logprob = more.cumulative_logprob
    if more.logprobs:
        part.logprobs = [*(part.logprobs or ()), *more.logprobs]
    part.finish_reason, part.stop_reason = more.finish_reason, more.stop_reason
