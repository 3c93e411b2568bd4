"""Observation: ASGI middleware that gives every HTTP request an id and a record, and reports it.

Around everything else, so that what other middleware refuses is seen, too. It knows neither
prompts nor answers: bodies pass through unread.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .logs import ACCESS_LOGGER, access_fields
from .metrics import ServerMetrics
from .record import RequestRecord, set_current_record
from .traces import Traces

_access = logging.getLogger(ACCESS_LOGGER)
_ID = re.compile(rb"[\x21-\x7e]{1,128}")
"""Request ids taken from a client: visible ASCII, so that they can be logged and sent back."""
_PROBES = frozenset({"/health", "/ready", "/metrics", "/api/status"})
"""Asked for every few seconds by machines; logged at DEBUG."""
CLIENT_LEFT = 499
"""Status of a request whose client left before the answer began, as nginx has it."""


class Observation:
    """Wraps an app.

    metrics: counts responses there. traces: a span per request that generates. A request that has
    an id, in the state of its scope, keeps it.
    """

    def __init__(
        self, app: ASGIApp, metrics: ServerMetrics | None = None, traces: Traces | None = None
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        state = scope.setdefault("state", {})
        state.setdefault("request_id", _request_id(headers.get(b"x-request-id")))
        record = RequestRecord(
            state["request_id"],
            method=scope["method"] if scope["method"].isalpha() else "?",
            path=quote(scope["path"]),
            client=(scope.get("client") or ("",))[0],
        )
        set_current_record(record)
        started = time.perf_counter()

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                _add_id(message, record.request_id)
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except Exception as error:
            record.error = type(error).__name__
            record.status = record.status or 500
            raise
        finally:
            record.seconds = time.perf_counter() - started
            self._report(record, scope, headers)

    def _report(self, record: RequestRecord, scope: Scope, headers: dict[bytes, bytes]) -> None:
        status = record.status or CLIENT_LEFT
        # The route's own pattern: paths are the client's, and as many as it likes.
        route = getattr(scope.get("route"), "path", "unknown")
        if self._metrics is not None:
            self._metrics.responses[route, str(status)] += 1
        level = logging.DEBUG if route in _PROBES and status < 400 else logging.INFO
        if _access.isEnabledFor(level):
            fields = access_fields(record, status)
            _access.log(level, "%s %s %d", record.method, record.path, status, extra=fields)
        if self._traces is not None and record.generates:
            self._traces.report(record, {k.decode("latin-1"): v for k, v in headers.items()})


def _request_id(given: bytes | None) -> str:
    if given is not None and _ID.fullmatch(given):
        return given.decode("ascii")
    return uuid.uuid4().hex


def _add_id(message: Message, request_id: str) -> None:
    headers = list(message.get("headers", ()))
    if not any(name.lower() == b"x-request-id" for name, _ in headers):
        message["headers"] = [*headers, (b"x-request-id", request_id.encode("ascii"))]
