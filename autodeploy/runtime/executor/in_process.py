"""InProcessExecutor: the engine runs in the caller's own process, inside `poll`."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from ...errors import EngineDeadError
from ..messages import EngineDied, EngineEvent, EngineReady, EngineRequest
from .base import BuildEngine, dead_error


class InProcessExecutor:
    """Runs one step of the engine per `poll`."""

    def __init__(self, build: BuildEngine) -> None:
        self._engine = build()
        self._work = threading.Condition()
        self._died: EngineDied | None = None
        self._closed = False
        self.ready = EngineReady(
            vocab_size=self._engine.vocab_size,
            max_model_len=self._engine.max_model_len,
            summary=self._engine.summary,
        )

    def submit(self, request: EngineRequest) -> None:
        with self._work:
            self._require_alive()
            self._engine.add(request)
            self._work.notify()

    def abort(self, request_ids: Iterable[str]) -> None:
        with self._work:
            if self._closed or self._died:
                return
            self._engine.abort(request_ids)
            self._work.notify()

    def poll(self, timeout: float) -> list[EngineEvent]:
        with self._work:
            if self._died:
                return [self._died]
            if self._closed:
                raise EngineDeadError("the engine was shut down; deploy the model again")
            if not self._engine.has_work:
                self._work.wait(timeout)
                if self._closed or not self._engine.has_work:
                    return []
            try:
                outputs = self._engine.step()
            except Exception as error:  # noqa: BLE001 - whatever it is, every request must hear of it
                self._died = EngineDied(
                    f"the engine failed in step {self._engine.stats().step + 1}: "
                    f"{type(error).__name__}: {error}"
                )
                self._died_of = error
                return [self._died]
            return [*outputs, self._engine.stats()]

    def shutdown(self) -> None:
        with self._work:
            if not self._closed:
                self._closed = True
                self._engine.close()
                self._work.notify_all()

    def _require_alive(self) -> None:
        if self._died:
            raise dead_error(self._died)
        if self._closed:
            raise EngineDeadError("the engine was shut down; deploy the model again")
