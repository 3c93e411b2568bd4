"""What every request passes before an endpoint sees it: its path, key and size.

Plain ASGI: Starlette's BaseHTTPMiddleware would hide from endpoints that a client has left.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version"})
"""Paths that need no key: what probes ask, and the page, which asks for a key itself."""


def error_response(error: ApiError) -> Response:
    """The response that an error is."""
    return Response(
        error.encoded(), error.status, headers=error.headers, media_type="application/json"
    )


class RootPath:
    """Takes requests under a path of a proxy, whether the proxy strips it or not."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path: str = scope["path"]
            if not f"{path}/".startswith(f"{self._root_path}/"):
                path = self._root_path + path
            scope = {**scope, "root_path": self._root_path, "path": path}
        await self._app(scope, receive, send)


class ApiKeys:
    """Lets through who has one of the keys. A key is compared as its hash, in constant time."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], root_path: str = "") -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(scope) or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        refusal = ApiError(
            401,
            # OpenAI's own words, by which LiteLLM knows this error.
            "Incorrect API key provided, or none; send it as the header  Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error_response(refusal)(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        path: str = scope["path"]
        # A browser asks before it sends the key.
        return scope["method"] == "OPTIONS" or path.removeprefix(self._root_path) in OPEN_PATHS

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        digest = _digest(key.strip())
        # All of them, and no early end: how long it takes says nothing about which one is near.
        equal = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(equal)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class BodyLimit:
    """Refuses bodies above a number of bytes: at once if they say so, else when they get there."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        stated = Headers(scope=scope).get("content-length", "")
        if stated.isdecimal() and int(stated[:20]) > self._limit:
            await error_response(self._refusal())(scope, receive, send)
            return
        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                # Whatever else is raised while a body is read, FastAPI makes a 400 of.
                raise HTTPException(413, str(self._refusal()))
            return message

        await self._app(scope, receive_counted, send)

    def _refusal(self) -> ApiError:
        return ApiError(
            413,
            f"the body of the request is larger than the {self._limit} bytes this server takes; "
            "send less at a time",
            code="request_too_large",
            headers={"Connection": "close"},
        )
