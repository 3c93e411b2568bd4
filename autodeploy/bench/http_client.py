"""A client for load: HTTP/1.1 over bare sockets, which counts events and reads only the last one.

On a machine with few cores a client that parses every event takes more of them than the server it
measures. This one counts a string of bytes in what arrives and keeps the end of it, where the
usage is (11 to 18 µs of CPU a token, on two slow cores).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

from ..errors import ConfigError
from .latencies import Served

# Of every event with output; the one that tells the usage has an empty list. Inside of JSON's
# strings quotes have backslashes.
_OUTPUT = b'"choices":[{'
_ERROR = b'data: {"error":'
_CARRY = len(_OUTPUT) - 1
_KEPT = 4096


class LoadError(Exception):
    """A request was not answered as it should be."""


@dataclass(frozen=True)
class Address:
    """A server, and how to ask it. headers: besides those that every request has."""

    host: str
    port: int
    secure: bool
    path: str
    headers: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, base_url: str, api_key: str | None = None) -> Address:
        """base_url: with or without the /v1 at its end.

        Raises:
            ConfigError: it is not an http or https URL.
        """
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--base-url '{base_url}' must be like http://HOST:PORT")
        secure = parts.scheme == "https"
        headers = (("Authorization", f"Bearer {api_key}"),) if api_key else ()
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, parts.port or (443 if secure else 80), secure, path, headers)

    def request(self, method: str, path: str, body: Any = None) -> bytes:
        """The bytes of a request. body: what becomes JSON; None: none."""
        content = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
        lines = [
            f"{method} {self.path}{path} HTTP/1.1",
            f"Host: {self.host}:{self.port}",
            "Content-Type: application/json",
            f"Content-Length: {len(content)}",
            *(f"{name}: {value}" for name, value in self.headers),
        ]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + content


class Connections:
    """Open connections to a server; one that is idle is used again."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._idle: list[Connection] = []

    async def ask(self, request: bytes, served: Served, reads: int | None = None) -> bytes:
        """Sends a request and waits for the end of the answer, of which the last bytes return.

        served: is told when output comes. reads: leaves after so many reads of the answer.

        Raises:
            LoadError: the connection fails, the status is not 200, or a stream ends with an error.
        """
        connection = await self._take()
        try:
            tail = await connection.ask(request, served, reads)
        except BaseException:
            connection.close()
            raise
        if reads is None and connection.keeps:
            self._idle.append(connection)
        else:
            connection.close()
        return tail

    async def get(self, path: str) -> Any:
        """The JSON at `path`.

        Raises:
            LoadError: there is none.
        """
        answer = await self.ask(self._address.request("GET", path), Served(0.0))
        return json.loads(answer)

    def close(self) -> None:
        """Closes those that are idle."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _take(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.lost:
                return connection
        address = self._address
        secure = ssl.create_default_context() if address.secure else None
        try:
            _, made = await asyncio.get_running_loop().create_connection(
                Connection, address.host, address.port, ssl=secure
            )
        except OSError as error:
            raise LoadError(
                f"cannot connect to {address.host} port {address.port}: {error}"
            ) from error
        return made


class Connection(asyncio.Protocol):
    """One connection, with one request at a time."""

    def __init__(self) -> None:
        self.lost = False
        self.keeps = True
        """Whether the server keeps it open after the answer."""
        self._transport: asyncio.Transport | None = None
        self._end: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's are no asyncio.Transport by class.
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._fail(f"the server closed the connection ({exc or 'at its own will'})")

    async def ask(self, request: bytes, served: Served, reads: int | None) -> bytes:
        self._served, self._reads = served, reads
        self._head: bytes | None = b""
        self._left: int | None = None
        self._tail = b""
        self._end = asyncio.get_running_loop().create_future()
        assert self._transport is not None
        self._transport.write(request)
        return await self._end

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._end is None or self._end.done():
            return
        now = time.perf_counter()
        if self._head is not None:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            # The line feed before the body stands where it does in later chunks.
            data, head = self._head[end + 3 :], self._head[:end]
            self._head = None
            self._read_head(head)
        events = (self._tail[-_CARRY:] + data).count(_OUTPUT)
        if events:
            self._served.times.append(now)
            self._served.events += events
        self._tail += data
        if self._left is None:
            self._tail = self._tail[-_KEPT:]
        self._see_end()
        if self._reads is not None and not self._end.done() and self._served.times:
            self._reads -= 1
            if self._reads <= 0:
                self._end.set_result(b"")

    def _read_head(self, head: bytes) -> None:
        self._status = int(head.split(None, 2)[1])
        lowered = head.lower()
        self.keeps = b"\r\nconnection: close" not in lowered
        length = re.search(rb"\r\ncontent-length: *(\d+)", lowered)
        # And the line feed of the head.
        self._left = int(length[1]) + 1 if length else None

    def _see_end(self) -> None:
        assert self._end is not None
        if self._left is not None:
            ended = len(self._tail) >= self._left
        else:
            ended = self._tail.endswith(b"\n0\r\n\r\n")
        if not ended:
            return
        error = self._tail.find(_ERROR)
        if self._status != 200 or error >= 0:
            said = self._tail[max(error, 0) :].decode(errors="replace").strip()
            self._fail(f"status {self._status}: {said:.500}")
        else:
            self._end.set_result(self._tail)

    def _fail(self, message: str) -> None:
        if self._end is not None and not self._end.done():
            self._end.set_exception(LoadError(message))


def completion_tokens(answer: bytes) -> int:
    """Output tokens by the usage at the end of an answer, streamed or whole.

    Raises:
        LoadError: it has none.
    """
    found = re.findall(rb'"completion_tokens": ?(\d+)', answer)
    if not found:
        raise LoadError(f"the answer tells no usage: {answer[-200:].decode(errors='replace')}")
    return int(found[-1])


@contextlib.contextmanager
def fast_loop() -> Iterator[asyncio.Runner]:
    """An asyncio runner, on uvloop where it is installed: the client's share is smaller."""
    try:
        import uvloop
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        yield runner
