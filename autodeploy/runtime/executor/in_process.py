"""InProcessExecutor: the engine runs in the caller's own process, inside `poll`."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ...errors import EngineDeadError, InvalidRequestError
from ..messages import EngineDied, EngineEvent, EngineRequest
from .base import BuildEngine, dead_error, refusal

_log = logging.getLogger("autodeploy")


class InProcessExecutor:
    """Runs one step of the engine per `poll`."""

    def __init__(self, build: BuildEngine) -> None:
        self._engine = build()
        self._work = threading.Lock()
        self._woken = threading.Event()
        self._refused: list[EngineEvent] = []
        self._died: EngineDied | None = None
        self._closed = False
        self.ready = self._engine.ready()

    def submit(self, request: EngineRequest) -> None:
        with self._work:
            if self._died:
                raise dead_error(self._died)
            self._require_open()
            try:
                self._engine.add(request)
            except InvalidRequestError as error:
                self._refused.append(refusal(request, error))
        self._woken.set()

    def abort(self, request_ids: Iterable[str]) -> None:
        with self._work:
            if not self._closed and not self._died:
                self._engine.abort(request_ids)
        self._woken.set()

    def poll(self, timeout: float) -> list[EngineEvent]:
        events = self._step()
        if events is None and self._woken.wait(timeout):
            self._woken.clear()
            events = self._step()
        return events or []

    def wake(self) -> None:
        self._woken.set()

    def shutdown(self) -> None:
        with self._work:
            if not self._closed:
                self._closed = True
                self._engine.close()
        self._woken.set()

    def _step(self) -> list[EngineEvent] | None:
        """Events of one step; None if there is nothing to do."""
        with self._work:
            if self._died:
                return [self._died]
            self._require_open()
            events, self._refused = self._refused, []
            if not self._engine.has_work:
                return events or None
            try:
                with _ctrl_c_held_back():
                    events += self._engine.step()
            except Exception as error:  # noqa: BLE001 - whatever it is, every request must hear of it
                _log.debug("the engine failed", exc_info=error)
                self._died = EngineDied(
                    f"the engine failed in step {self._engine.stats().step + 1}: "
                    f"{type(error).__name__}: {error}"
                )
                return [*events, self._died]
            return [*events, self._engine.stats()]

    def _require_open(self) -> None:
        if self._closed:
            raise EngineDeadError("the engine was shut down; deploy the model again")


@contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Lets an interrupt wait for the end of a step: half of one leaves pages with no owner."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    caught: list[tuple[int, object]] = []
    signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if caught:
            handler(caught[0][0], None)
