"""Work for somebody who may leave: it ends with its client, its deadline and its server.

Whoever generates is told by cancellation, and AsyncLLM's streams abort when they are left, so the
pages of a request are free one step after its client is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Message, Receive

from .admission import Admission, shutting_down
from .errors import ApiError

T = TypeVar("T")


class ClientLeft(Exception):
    """Nobody is there to be answered."""


async def attended(
    work: Coroutine[Any, Any, T], receive: Receive, admission: Admission, timeout: float | None
) -> T:
    """The result of `work`, which is cancelled as soon as there is no use for it.

    receive: of a request whose body has been read. timeout: seconds.

    Raises:
        ClientLeft: the client closed the connection.
        ApiError: 504 after `timeout`, 503 if the server ends first.
    """
    doing = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(receive))
    ending = asyncio.create_task(admission.ended.wait())
    try:
        await asyncio.wait(
            (doing, leaving, ending), timeout=timeout, return_when=asyncio.FIRST_COMPLETED
        )
        if doing.done():
            return doing.result()
        cause = _cause(leaving.done(), ending.done(), timeout)
    finally:
        for task in (doing, leaving, ending):
            task.cancel()
        await asyncio.gather(doing, leaving, ending, return_exceptions=True)
    raise cause


def _cause(left: bool, ended: bool, timeout: float | None) -> Exception:
    if left:
        return ClientLeft()
    if ended:
        return shutting_down()
    return ApiError(
        504,
        f"the request took longer than the {timeout:g} seconds this server gives one",
        kind="timeout_error",
        code="request_timeout",
        # OpenAI's clients would try again, and be too late again.
        headers={"x-should-retry": "false"},
    )


async def _disconnected(receive: Receive) -> None:
    message: Message = await receive()
    while message["type"] != "http.disconnect":
        message = await receive()
