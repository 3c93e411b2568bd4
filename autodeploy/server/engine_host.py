"""EngineHost: the engine that requests go to, and what happens when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from ..async_llm import AsyncLLM
from ..errors import AutodeployError, EngineDeadError

_log = logging.getLogger("autodeploy")
_FIRST_WAIT_SECONDS = 0.1
_LONGEST_WAIT_SECONDS = 10.0
_STABLE_SECONDS = 10.0


class EngineHost:
    """Holds one AsyncLLM at a time.

    build: makes another one, in a thread; None: a dead engine stays dead. gave_up: called once if
    the engine died and is not coming back.
    """

    def __init__(self, llm: AsyncLLM, build: Callable[[], AsyncLLM] | None = None) -> None:
        self.llm = llm
        self.restarts = 0
        self.gave_up: Callable[[], None] = lambda: None
        self._build = build
        self._watch: asyncio.Task[None] | None = None

    @property
    def death(self) -> AutodeployError | None:
        """Why there is no engine to serve with; None if there is one."""
        return self.llm.death

    def living(self) -> AsyncLLM:
        """The engine.

        Raises:
            EngineDeadError: it is gone.
        """
        if self.death is not None:
            again = "; it is being started again" if self._build else ""
            raise EngineDeadError(f"the engine is gone: {self.death}{again}")
        return self.llm

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
            _log.error("the engine died: %s", death)
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
                self.llm = await asyncio.to_thread(build)
            except Exception as error:  # noqa: BLE001 - whatever it is, nobody else would try again
                _log.error("the engine could not be started again: %s", error)
                _log.debug("while starting the engine", exc_info=error)
                continue
            self.restarts += 1
            _log.warning("the engine is back, after %d restarts in all", self.restarts)
            return wait
