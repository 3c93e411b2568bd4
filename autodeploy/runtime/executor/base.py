"""Executor: where an engine lives, and how the front talks to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from ... import errors
from ..engine import EngineCore
from ..messages import EngineDied, EngineEvent, EngineReady, EngineRequest, RequestFailed

BuildEngine = Callable[[], EngineCore]


class Executor(Protocol):
    """Hosts one engine. Safe to call from several threads; `poll` from one at a time."""

    ready: EngineReady

    def submit(self, request: EngineRequest) -> None:
        """Queues a request; one that cannot be served becomes a `RequestFailed` event.

        Raises:
            EngineDeadError: the engine is gone.
        """

    def abort(self, request_ids: Iterable[str]) -> None:
        """Ends requests; each reports its end. Unknown ids are ignored."""

    def poll(self, timeout: float) -> list[EngineEvent]:
        """Events since the last call, waiting up to `timeout` seconds for the first.

        After the engine's death: one `EngineDied`, again at every call.

        Raises:
            EngineDeadError: after `shutdown`.
        """

    def wake(self) -> None:
        """Makes a `poll` that waits, or else the next one, return without waiting."""

    def shutdown(self) -> None:
        """Stops the engine and frees everything; may be called again."""


def dead_error(died: EngineDied) -> errors.AutodeployError:
    """The exception that an `EngineDied` event stands for."""
    kind = getattr(errors, died.error, errors.EngineDeadError)
    return kind(died.message)


def refusal(request: EngineRequest, error: errors.InvalidRequestError) -> RequestFailed:
    """The event that an engine's refusal of a request becomes."""
    return RequestFailed(
        request_id=request.request_id, error=type(error).__name__, message=str(error)
    )
