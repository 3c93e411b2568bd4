"""The two ways to answer: one JSON object, or server-sent events as they come.

Both are Starlette responses, so that what goes wrong before the first byte becomes an error with
its own status. Afterwards the status is out, and an error is an event of the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .admission import Admission
from .attended import ClientLeft, attended
from .errors import ApiError, as_api_error

_log = logging.getLogger("autodeploy")
DONE = b"data: [DONE]\n\n"
_PARTING_SECONDS = 2.0


@dataclass(frozen=True)
class Closing:
    """The last bytes of a stream. done: if all went well. failed: of an error's stream."""

    done: bytes = DONE
    failed: Callable[[ApiError], bytes] = lambda e: b"data: " + e.encoded() + b"\n\n" + DONE


def event(chunk: BaseModel) -> bytes:
    """One server-sent event; only fields that were given are in it."""
    return b"data: " + chunk.__pydantic_serializer__.to_json(chunk, exclude_unset=True) + b"\n\n"


class TextEvents:
    """Events that differ in one text only, as most of a stream do: pydantic is asked once.

    example: the chunk, with `TEXT` where the text goes.
    """

    TEXT = "\0text\0"
    """No text of a request or a model's name has a NUL in JSON written like this."""

    def __init__(self, example: BaseModel) -> None:
        self._before, self._after = event(example).split(msgspec.json.encode(self.TEXT))

    def event(self, text: str) -> bytes:
        """The event with `text`."""
        return self._before + msgspec.json.encode(text) + self._after


class WholeAnswer(Response):
    """Runs `work` and sends the object it returns."""

    def __init__(
        self, work: Coroutine[Any, Any, BaseModel], admission: Admission, timeout: float | None
    ) -> None:
        super().__init__()
        self._work, self._admission, self._timeout = work, admission, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await attended(self._work, receive, self._admission, self._timeout)
        except ClientLeft:
            return
        body = answer.__pydantic_serializer__.to_json(answer, exclude_unset=True)
        await Response(body, media_type="application/json")(scope, receive, send)


class StreamAnswer(Response):
    """Sends events as they come, then what closes the stream, which is `[DONE]` unless told
    otherwise; the status is 200 once the first event is there."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        admission: Admission,
        timeout: float | None,
        closing: Closing | None = None,
    ) -> None:
        super().__init__(
            media_type="text/event-stream",
            # Without the second one nginx keeps events until it has some kilobytes of them.
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        del self.headers["content-length"]
        self._events, self._admission, self._timeout = events, admission, timeout
        self._closing = closing or Closing()
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await attended(self._send_all(send), receive, self._admission, self._timeout)
            last = self._closing.done
        except ClientLeft:
            return
        except Exception as error:
            if not self._started:
                raise
            problem = as_api_error(error)
            _log.warning("a stream ends with an error: %s", error)
            last = self._closing.failed(problem)
        # A client that has stopped reading must not hold on to us.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PARTING_SECONDS):
                await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _start(self, send: Send) -> None:
        """Sends status and headers, once."""
        if not self._started:
            self._started = True
            await send(
                {
                    "type": "http.response.start", "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )  # fmt: skip

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for data in events:
                await self._start(send)
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await self._start(send)  # of a stream without events
