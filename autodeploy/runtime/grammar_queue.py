"""GrammarQueue: requests whose grammar is being compiled, kept away from steps until it is.

A grammar takes from a millisecond to seconds; requests that decode meanwhile must not wait for it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from autodeploy.errors import AutodeployError, EngineError, SamplingParamsError

from .grammars import Grammars
from .messages import EngineRequest

if TYPE_CHECKING:
    from llguidance import LLMatcher

GrammarSource = Callable[[], Grammars]
"""Makes the grammars of the served model's tokenizer, at the first request that needs them."""
AT_ONCE = 2
"""Grammars compiled at a time."""


class GrammarQueue:
    """Compiles on threads of its own.

    source: None if the engine knows no tokenizer.
    """

    def __init__(self, source: GrammarSource | None) -> None:
        self._source = source
        self._grammars: Grammars | None = None
        self._waiting: dict[str, EngineRequest] = {}
        self._done: queue.SimpleQueue[tuple[EngineRequest, LLMatcher | AutodeployError]] = (
            queue.SimpleQueue()
        )
        self._free = threading.BoundedSemaphore(AT_ONCE)
        self._making = threading.Lock()

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    def matcher(self, request: EngineRequest) -> LLMatcher | None:
        """For a request with a constraint, if nothing has to be compiled for it."""
        params = request.params.structured_outputs
        assert params is not None
        if self._source is None:
            raise SamplingParamsError(
                "structured_outputs needs a tokenizer, and the engine was built without one: pass "
                "tokenizer=... to deploy"
            )
        return None if self._grammars is None else self._grammars.find(params)

    def put(self, request: EngineRequest) -> None:
        """Compiles a request's grammar; `take` gives it back."""
        self._waiting[request.request_id] = request
        work = threading.Thread(
            target=self._compile, args=(request,), name="autodeploy-grammars", daemon=True
        )
        work.start()

    def drop(self, request_id: str) -> bool:
        """Forgets a request; False if it is not here."""
        return self._waiting.pop(request_id, None) is not None

    def take(self, wait_seconds: float) -> list[tuple[EngineRequest, LLMatcher | AutodeployError]]:
        """Requests whose grammar is compiled, or why it cannot be; waits for the first."""
        found = []
        try:
            while self._waiting:
                request, outcome = self._done.get(wait_seconds > 0, wait_seconds or None)
                wait_seconds = 0.0
                if self._waiting.get(request.request_id) is request:
                    del self._waiting[request.request_id]
                    found.append((request, outcome))
        except queue.Empty:
            pass
        return found

    def _compile(self, request: EngineRequest) -> None:
        params = request.params.structured_outputs
        assert params is not None
        outcome: LLMatcher | AutodeployError
        with self._free:
            try:
                outcome = self._of_tokenizer().compile(params)
            except AutodeployError as error:
                outcome = error
            except Exception as error:  # noqa: BLE001 - whatever it is, the request must hear of it
                outcome = EngineError(f"its grammar failed: {type(error).__name__}: {error}")
        self._done.put((request, outcome))

    def _of_tokenizer(self) -> Grammars:
        with self._making:
            if self._grammars is None:
                assert self._source is not None
                self._grammars = self._source()
            return self._grammars
