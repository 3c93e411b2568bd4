"""Replica: one engine that requests go to, and what happens when it dies."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
import time
from collections.abc import Callable

from ..async_llm import AsyncLLM
from .routing import PrefixIndex

_log = logging.getLogger("autodeploy")
_FIRST_WAIT_SECONDS = 0.1
_LONGEST_WAIT_SECONDS = 10.0
_STABLE_SECONDS = 10.0


class Replica:
    """Holds one AsyncLLM at a time.

    build: makes another one, in a thread; None: a dead engine stays dead. gave_up: called once if
    the engine died and is not coming back. number: among its like, from 0.
    """

    def __init__(self, llm: AsyncLLM, build: Callable[[], AsyncLLM] | None = None) -> None:
        self.number = 0
        self.restarts = 0
        self.turn = 0
        """When a request was last sent here, by the count of whoever sends them."""
        self.gave_up: Callable[[], None] = lambda: None
        self._build = build
        self._watch: asyncio.Task[None] | None = None
        self._take(llm)

    def _take(self, llm: AsyncLLM) -> None:
        self.llm = llm
        # Its cache is empty.
        self.prefixes = PrefixIndex(llm.ready.prefix_blocks)

    @property
    def comes_back(self) -> bool:
        """Whether a dead engine is replaced."""
        return self._build is not None

    def start(self) -> None:
        """Begins to watch; on the event loop that serves."""
        self._watch = asyncio.create_task(self._watch_engine())

    async def stop(self) -> None:
        """Stops watching, ends every stream and stops the engine."""
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        await self.llm.shutdown()

    async def _watch_engine(self) -> None:
        wait = _FIRST_WAIT_SECONDS
        while True:
            began = time.monotonic()
            death = await self.llm.died()
            _log.error("the engine died (replica %d): %s", self.number, death)
            if self._build is None:
                self.gave_up()
                return
            if time.monotonic() - began > _STABLE_SECONDS:
                wait = _FIRST_WAIT_SECONDS
            wait = await self._restart(self._build, wait)

    async def _restart(self, build: Callable[[], AsyncLLM], wait: float) -> float:
        """Builds engines until one stands; returns the seconds to wait after the next death."""
        while True:
            await asyncio.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT_SECONDS)
            try:
                llm = await _built(build)
            except Exception as error:  # noqa: BLE001 - whatever it is, nobody else would try again
                _log.error("replica %d could not be started again: %s", self.number, error)
                _log.debug("while starting the engine", exc_info=error)
                continue
            self._take(llm)
            self.restarts += 1
            _log.warning(
                "the engine is back (replica %d), after %d restarts in all",
                self.number, self.restarts,
            )  # fmt: skip
            return wait


async def _built(build: Callable[[], AsyncLLM]) -> AsyncLLM:
    """What `build` makes, in a thread of its own; cancelled, nobody waits for that.

    Not `asyncio.to_thread`: a server that stops would wait for the threads of the event loop, and
    loading a large model takes minutes. A process that is only starting ends with this one.
    """
    made: concurrent.futures.Future[AsyncLLM] = concurrent.futures.Future()

    def work() -> None:
        try:
            llm = build()
        except BaseException as error:  # noqa: BLE001 - raised by whoever waits
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                made.set_exception(error)
            return
        try:
            made.set_result(llm)
        except concurrent.futures.InvalidStateError:
            # Nobody wants it any more, and this thread has no event loop but for this.
            asyncio.run(llm.shutdown())

    threading.Thread(target=work, name="autodeploy-restart", daemon=True).start()
    return await asyncio.wrap_future(made)
