"""RequestRecord: what one HTTP request was, for the access log and for traces. Never its text.

A context variable holds the one of the request being served, so that log lines find its id, and
whoever watches the streams (`watch`) finds where to count.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class RequestRecord:
    """One HTTP request and its answer. `n` prompts in it are summed."""

    request_id: str
    method: str = ""
    path: str = ""
    """Without the query, which may hold anything."""
    client: str = ""
    started: float = field(default_factory=time.time)
    """Seconds since the epoch."""
    seconds: float = 0.0
    """Until the last byte of the answer."""
    status: int | None = None
    """Of the answer; None if the client left before there was one."""
    model: str | None = None
    sequences: int = 0
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    first_token_seconds: float | None = None
    """From the request's arrival to its first token."""
    queue_seconds: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    """One per prompt."""
    error: str | None = None
    """Type of what went wrong."""

    @property
    def generates(self) -> bool:
        """Whether a model was asked to write something."""
        return self.model is not None


_current: ContextVar[RequestRecord | None] = ContextVar("autodeploy_request", default=None)


def current_record() -> RequestRecord | None:
    """Of the request being served here; None outside of any."""
    return _current.get()


def set_current_record(record: RequestRecord) -> None:
    """For the rest of this task, and the tasks it starts."""
    _current.set(record)
