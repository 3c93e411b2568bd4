"""Admission: how many sequences are open, whether more may come, and when all must go."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import RETRY_SECONDS, ApiError, invalid

_log = logging.getLogger("autodeploy")


class Admission:
    """Counts open sequences against a limit. Belongs to one event loop.

    limit: sequences, that is prompts times n, waiting and running together.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.open = 0
        self.refused = 0
        self.draining = False
        """Whether the server is on its way out: open requests go on, no new one is let in."""
        self.ended = asyncio.Event()
        """Set when even open requests must end."""
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def sequences(self, count: int) -> Iterator[None]:
        """Holds places for `count` sequences.

        Raises:
            ApiError: 503 while draining, 429 if there are not so many places now, 400 if there
                never are.
        """
        if self.draining:
            raise shutting_down()
        if count > self.limit:
            raise invalid(
                f"the request makes {count} sequences (prompts times n), and this server holds "
                f"{self.limit}; divide it"
            )
        if self.open + count > self.limit:
            self.refused += 1
            raise ApiError(
                429,
                f"{self.open} sequences are open and {count} more would be above the "
                f"{self.limit} that this server holds; try again soon",
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"Retry-After": RETRY_SECONDS},
            )
        self.open += count
        self._idle.clear()
        try:
            yield
        finally:
            self.open -= count
            if not self.open:
                self._idle.set()

    async def drain(self, timeout: float) -> bool:
        """Lets nobody in, waits until nobody is left, and ends the rest after `timeout` seconds.

        Returns whether all ended by themselves.
        """
        self.draining = True
        _log.info("no new requests; %d sequences are open", self.open)
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
            return True
        except TimeoutError:
            _log.warning("ended %d sequences after %g seconds", self.open, timeout)
            self.ended.set()
            return False


def shutting_down() -> ApiError:
    """The answer of a server that is on its way out."""
    return ApiError(
        503,
        "the server is shutting down; try again, by then another may serve",
        code="shutting_down",
        headers={"Retry-After": RETRY_SECONDS},
    )
