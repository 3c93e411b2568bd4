"""Service: what endpoints are given; the engine, the limits and the model's names."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request

from .admission import Admission
from .answers import Closing, StreamAnswer, WholeAnswer
from .chat_message import Formats
from .config import ServerConfig
from .engine_host import EngineHost
from .errors import ApiError
from .metrics import ServerMetrics
from .response_store import ResponseStore


@dataclass
class Service:
    """One per application."""

    config: ServerConfig
    host: EngineHost
    admission: Admission
    metrics: ServerMetrics
    formats: Formats
    model: str
    """What was deployed: a path or hub id."""
    created: int
    """When, in seconds since 1970."""
    responses: ResponseStore

    @property
    def model_names(self) -> list[str]:
        return self.config.served_model_name or [self.model]

    def model_name(self, asked: str | None) -> str:
        """The name to answer with.

        Raises:
            ApiError: 404, another model is asked for.
        """
        if asked is None:
            return self.model_names[0]
        if asked not in self.model_names:
            raise ApiError(
                404,
                f"the model '{asked:.200}' does not exist here; this server has "
                f"{', '.join(self.model_names)}",
                param="model",
                code="model_not_found",
            )
        return asked

    def whole(self, work: Coroutine[Any, Any, BaseModel]) -> WholeAnswer:
        """The answer that `work` returns."""
        return WholeAnswer(work, self.admission, self.config.request_timeout)

    def stream(
        self, events: AsyncGenerator[bytes, None], closing: Closing | None = None
    ) -> StreamAnswer:
        """The answer that `events` are."""
        return StreamAnswer(events, self.admission, self.config.request_timeout, closing)


async def service_of(request: Request) -> Service:
    """The service of the application that a request came to; a FastAPI dependency.

    Async, because FastAPI calls others in a thread: 40 of them, for a look at an attribute.
    """
    service: Service = request.app.state.service
    return service
