"""WorkerExecutor: the engine runs in a process of its own, and its death is an event.

Requests and tokens cross a ZeroMQ socket as msgpack, never as pickle. A live model reaches the
worker once, when the process is started, through shared memory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterable

import msgspec
import torch.multiprocessing
import zmq

from ...errors import EngineDeadError
from ..messages import (
    AbortRequest,
    EngineDied,
    EngineEvent,
    EngineReady,
    EngineRequest,
    FromEngine,
    FromFront,
    Shutdown,
)
from .base import BuildEngine, dead_error
from .worker_process import run_worker

_GRACE_SECONDS = 5.0


class WorkerExecutor:
    """Starts a worker and talks to it; `poll` notices when it is gone."""

    def __init__(self, build: BuildEngine) -> None:
        self._folder = tempfile.mkdtemp(prefix="autodeploy-")
        os.chmod(self._folder, 0o700)
        address = f"ipc://{self._folder}/engine"
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(address)
        # A ZeroMQ socket belongs to one thread at a time.
        self._lock = threading.Lock()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._died: EngineDied | None = None
        self._closed = False
        spawn = torch.multiprocessing.get_context("spawn")
        self._process = spawn.Process(
            target=run_worker, args=(address, os.getpid(), build), daemon=True, name="autodeploy"
        )
        try:
            self._process.start()
            self.ready = self._wait_until_ready()
        except BaseException:
            self.shutdown()
            raise

    @property
    def pid(self) -> int | None:
        """The worker's process id."""
        return self._process.pid

    def submit(self, request: EngineRequest) -> None:
        if self._closed:
            raise EngineDeadError("the engine was shut down; deploy the model again")
        if self._died:
            raise dead_error(self._died)
        self._send(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        if not self._closed and not self._died:
            self._send(AbortRequest(list(request_ids)))

    def poll(self, timeout: float) -> list[EngineEvent]:
        if self._died:
            return [self._died]
        if self._closed:
            raise EngineDeadError("the engine was shut down; deploy the model again")
        deadline = time.monotonic() + timeout
        while True:
            # Short waits, so that another thread can send in between.
            events = self._receive(min(0.02, max(0.0, deadline - time.monotonic())))
            died = next((e for e in events if isinstance(e, EngineDied)), None)
            if died is not None:
                self._died = died
            if events or self._notice_death() or time.monotonic() >= deadline:
                return events or ([self._died] if self._died else [])

    def shutdown(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._process.pid is not None:
            if self._process.is_alive():
                with contextlib.suppress(zmq.ZMQError):
                    self._send(Shutdown())
                self._process.join(_GRACE_SECONDS)
            if self._process.is_alive():
                self._process.kill()
            self._process.join()
        self._socket.close(0)
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _wait_until_ready(self) -> EngineReady:
        while True:
            for event in self.poll(0.5):
                if isinstance(event, EngineReady):
                    return event
                if isinstance(event, EngineDied):
                    raise dead_error(event)

    def _send(self, message: FromFront) -> None:
        data = self._encoder.encode(message)
        with self._lock:
            self._socket.send(data, zmq.NOBLOCK)

    def _receive(self, timeout: float) -> list[EngineEvent]:
        events: list[EngineEvent] = []
        with self._lock:
            if self._socket.poll(int(timeout * 1000) if timeout else 0):
                while True:
                    try:
                        events += self._decoder.decode(self._socket.recv(zmq.NOBLOCK))
                    except zmq.Again:
                        break
        return events

    def _notice_death(self) -> bool:
        if self._process.is_alive():
            return False
        # What it said last may still be on the socket.
        last = [e for e in self._receive(0.05) if isinstance(e, EngineDied)]
        self._died = last[0] if last else EngineDied(f"the engine's worker {self._how_it_ended()}")
        return True

    def _how_it_ended(self) -> str:
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"was killed by {signal.Signals(-code).name}; deploy the model again"
        return f"exited with code {code}; deploy the model again"
