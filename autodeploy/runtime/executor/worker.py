"""WorkerExecutor: the engine runs in a process of its own, and its death is an event.

Requests and tokens cross a ZeroMQ socket as msgpack, never as pickle. A live model reaches the
worker once, when the process is started, through shared memory.

Waiting is for three things at once: a message of the worker, its end, and a call from another
thread. Only the thread that holds the socket's lock touches the socket; the others leave their
messages in the outbox.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import pickle
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable

import msgspec
import torch.multiprocessing
import zmq

from ...errors import ConfigError, EngineDeadError
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
_LAST_WORDS_SECONDS = 0.2


class WorkerExecutor:
    """Starts a worker and talks to it; `poll` notices when it is gone.

    Raises:
        ConfigError: `build` cannot be sent to another process.
        EngineDeadError: the worker ended before it was ready.
        AutodeployError: the engine could not be built; type and message are the worker's.
    """

    def __init__(self, build: BuildEngine) -> None:
        self._folder = tempfile.mkdtemp(prefix="autodeploy-")
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        for option, value in ((zmq.LINGER, 0), (zmq.SNDHWM, 0), (zmq.RCVHWM, 0)):
            self._socket.setsockopt(option, value)
        self._lock = threading.Lock()
        self._outbox: deque[bytes] = deque()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._died: EngineDied | None = None
        self._is_ready = False
        self._closed = False
        spawn = torch.multiprocessing.get_context("spawn")
        level = logging.getLogger("autodeploy").getEffectiveLevel()
        self._process = spawn.Process(
            target=run_worker, args=(self._bind(), level, build), daemon=True, name="autodeploy"
        )
        # Where a thread builds, the program may end before the worker is ready.
        atexit.register(self.shutdown)
        try:
            self._start()
            self.ready = self._wait_until_ready()
            self._is_ready = True
            # They have met. A file that is gone cannot be left behind by whatever ends us.
            shutil.rmtree(self._folder, ignore_errors=True)
        except BaseException:
            self.shutdown()
            raise
        finally:
            atexit.unregister(self.shutdown)

    @property
    def pid(self) -> int | None:
        """The worker's process id; None once it has been shut down."""
        return None if self._closed else self._process.pid

    def submit(self, request: EngineRequest) -> None:
        self._require_open()
        if self._died:
            raise dead_error(self._died)
        self._send(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        if not self._closed and not self._died:
            self._send(AbortRequest(list(request_ids)))

    def poll(self, timeout: float) -> list[EngineEvent]:
        self._require_open()
        with self._lock:
            events = self._wait(timeout)
        self._send_if_free()
        return events

    def wake(self) -> None:
        # A full buffer means that a wake-up is on its way already.
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake_writer.send(b"!")

    def shutdown(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._process.pid is not None:
            if self._is_ready and self._process.is_alive():
                self._send(Shutdown())
                self._process.join(_GRACE_SECONDS)
            if self._process.is_alive():
                self._process.kill()
            self._process.join()
        self.wake()
        with self._lock:
            self._socket.close(0)
            self._context.term()
            self._wake_reader.close()
            self._wake_writer.close()
            # Its pipes would stay open until the collector comes by.
            self._process.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _bind(self) -> str:
        """The address to meet the worker at: a socket file nobody else can open."""
        path = f"{self._folder}/engine"
        if zmq.has("ipc") and len(os.fsencode(path)) < zmq.IPC_PATH_MAX_LEN:
            self._socket.bind(f"ipc://{path}")
            return f"ipc://{path}"
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        return f"tcp://127.0.0.1:{port}"

    def _start(self) -> None:
        try:
            self._process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"the model cannot be sent to a worker process ({error}); "
                "use executor='inprocess', or deploy a checkpoint directory"
            ) from error
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake_reader.fileno(), zmq.POLLIN)
        self._poller.register(self._process.sentinel, zmq.POLLIN)

    def _wait_until_ready(self) -> EngineReady:
        while True:
            for event in self.poll(1.0):
                if isinstance(event, EngineReady):
                    return event
                if isinstance(event, EngineDied):
                    raise dead_error(event)

    def _require_open(self) -> None:
        if self._closed:
            raise EngineDeadError("the engine was shut down; deploy the model again")

    def _send(self, message: FromFront) -> None:
        self._outbox.append(self._encoder.encode(message))
        self._send_if_free()
        if self._outbox:
            # Another thread holds the socket, and may be asleep.
            self.wake()

    def _send_if_free(self) -> None:
        """Sends what waits, unless another thread holds the socket: that one will."""
        while self._outbox and self._lock.acquire(blocking=False):
            try:
                if not self._send_waiting():
                    return
            finally:
                self._lock.release()

    def _send_waiting(self) -> bool:
        """Sends the outbox; False if the worker is gone."""
        while self._outbox:
            try:
                self._socket.send(self._outbox[0], zmq.NOBLOCK)
            except zmq.ZMQError:
                # Nobody at the other end, or closed here: `poll` or the caller finds out.
                return False
            self._outbox.popleft()
        return True

    def _wait(self, timeout: float) -> list[EngineEvent]:
        deadline = time.monotonic() + timeout
        while self._died is None:
            self._send_waiting()
            left = max(0.0, deadline - time.monotonic())
            ready = dict(self._poller.poll(round(left * 1000)))
            events = self._receive(0.0) if self._socket in ready else []
            if self._wake_reader.fileno() in ready:
                self._wake_reader.recv(4096)
            elif self._process.sentinel in ready and not events:
                events = self._receive(_LAST_WORDS_SECONDS)
                if self._died is None:
                    self._died = EngineDied(f"the engine's worker {self._how_it_ended()}")
                    events.append(self._died)
            if events or ready or left == 0.0:
                return events
        return [self._died]

    def _receive(self, wait_seconds: float) -> list[EngineEvent]:
        """All messages that have come; the first may take `wait_seconds`."""
        events: list[EngineEvent] = []
        self._socket.poll(round(wait_seconds * 1000))
        with contextlib.suppress(zmq.Again):
            while True:
                events += self._decoder.decode(self._socket.recv(zmq.NOBLOCK))
        self._died = next((e for e in events if isinstance(e, EngineDied)), self._died)
        return events

    def _how_it_ended(self) -> str:
        self._process.join()
        code = self._process.exitcode or 0
        if code < 0:
            known = -code in {int(number) for number in signal.Signals}
            name = signal.Signals(-code).name if known else f"signal {-code}"
            why = " (the system may have run out of memory)" if -code == signal.SIGKILL else ""
            return f"was killed by {name}{why}; deploy the model again"
        if not self._is_ready:
            return (
                f"exited with code {code} before it was ready; see what it printed. A script "
                "that uses executor='process' must deploy under `if __name__ == '__main__':`"
            )
        return f"exited with code {code}; deploy the model again"
