"""Running the application under uvicorn, and stopping it gracefully.

uvicorn closes its port at SIGTERM. Here the port stays open until the open streams have ended, so
that /ready can say that nothing more should come.
"""

from __future__ import annotations

import asyncio
import os
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ..errors import ConfigError
from .config import ServerConfig
from .service import Service

# After the last stream has ended: for answers that are being written.
CLOSING_SECONDS = 3


def serve(app: FastAPI, config: ServerConfig, listener: socket.socket) -> int:
    """Serves until told to stop; the exit status: 0, or 1 if the engine died.

    Raises:
        ConfigError: a certificate cannot be read.
    """
    service: Service = app.state.service
    server = Server(uvicorn_config(app, config), service)
    scheme = "https" if config.ssl_certfile else "http"
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    # Who reads the line may call at once, which may be before uvicorn takes the first call.
    listener.listen(server.config.backlog)
    print(f"serving {', '.join(service.model_names)} on {scheme}://{shown}:{port}", flush=True)
    server.run([listener])
    return server.status


def uvicorn_config(app: FastAPI, config: ServerConfig) -> uvicorn.Config:
    """uvicorn's settings, with certificates read.

    Raises:
        ConfigError: one cannot be read.
    """
    made = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        # A proxy's word on who the client is counts only where the proxy is.
        proxy_headers=False,
        timeout_graceful_shutdown=CLOSING_SECONDS,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        ssl_ca_certs=config.ssl_ca_certs,
        ssl_cert_reqs=config.ssl_cert_reqs,
    )
    try:
        made.load()
    except OSError as error:
        raise ConfigError(
            f"the certificate or key cannot be read ({error}); look at "
            f"ssl_certfile={config.ssl_certfile} and ssl_keyfile={config.ssl_keyfile}"
        ) from error
    return made


def bound_socket(config: ServerConfig) -> socket.socket:
    """The address, taken but not listened on: before a model is loaded for nothing.

    Raises:
        ConfigError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {config.host} port {config.port}: {os.strerror(error.errno or 0)}; "
            "give another --port or --host"
        ) from error
    return listener


class Server(uvicorn.Server):
    """uvicorn's server, with our way to stop."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.status = 0
        self._service = service
        self._stopping: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        service.host.gave_up = self._engine_is_gone

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets open requests end, the second ends them."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._drain())
        else:
            self._service.admission.ended.set()
            self.should_exit = True

    async def _drain(self) -> None:
        admission = self._service.admission
        await admission.drain(self._service.config.shutdown_timeout)
        self.should_exit = True

    def _engine_is_gone(self) -> None:
        self.status = 1
        self._stop()
