"""What runs inside a worker: build the engine, then steps and messages in turn, until told."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
import traceback
from collections.abc import Sequence

import msgspec
import zmq

from ...errors import AutodeployError, InvalidRequestError
from ..engine import EngineCore
from ..messages import (
    AbortRequest,
    EngineDied,
    EngineEvent,
    EngineRequest,
    FromFront,
    Shutdown,
)
from .base import BuildEngine, refusal

_STATS_EVERY_STEPS = 16
_KERNELS_KEPT = "32"
_log = logging.getLogger("autodeploy")


def run_worker(address: str, log_level: int, build: BuildEngine) -> None:
    """Entry point of the process; it ends when told to, and with its parent.

    log_level: of the parent's logger `autodeploy`.
    """
    # Ctrl-C in a terminal reaches this process too; what it means is for the front to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watch = threading.Thread(target=_end_with_parent, args=(address,), daemon=True)
    watch.start()
    if log_level < logging.WARNING:
        logging.basicConfig(format="%(name)s worker: %(message)s")
        _log.setLevel(log_level)
    _bound_kernel_cache()
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    for option, value in ((zmq.LINGER, 1000), (zmq.SNDHWM, 0), (zmq.RCVHWM, 0)):
        socket.setsockopt(option, value)
    socket.connect(address)
    try:
        _Worker(socket, build()).run()
    except Exception as error:
        socket.send(msgspec.msgpack.encode([_last_words(error)]))
        _log.debug("the worker failed", exc_info=error)
        raise SystemExit(1) from error
    finally:
        socket.close()
        context.term()


def _bound_kernel_cache() -> None:
    """Keeps what oneDNN compiles on a CPU from filling the memory.

    A kernel for every number of tokens and every linear of a step, some 0.8 MB each in bfloat16, is
    kept twice: by oneDNN, and by what torch wraps it in, 1024 of them each by default. An engine
    grew by 500 MB over 4000 requests; with 32 it is as fast, where every step has another size.
    Both read their variable when they are first used.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, _KERNELS_KEPT)


def _end_with_parent(address: str) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    if address.startswith("ipc://"):
        shutil.rmtree(os.path.dirname(address.removeprefix("ipc://")), ignore_errors=True)
    # Nobody is left to talk to; a step in progress must not keep the process.
    os._exit(1)


def _last_words(error: Exception) -> EngineDied:
    if isinstance(error, AutodeployError):
        return EngineDied(str(error), type(error).__name__)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(frame.filename)}:{frame.lineno}"
    return EngineDied(f"the engine's worker failed at {where}: {type(error).__name__}: {error}")


class _Worker:
    def __init__(self, socket: zmq.Socket[bytes], engine: EngineCore) -> None:
        self._socket = socket
        self._engine = engine
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromFront)
        self._running = True

    def run(self) -> None:
        engine = self._engine
        self._send([engine.ready()])
        steps = 0
        while True:
            self._take_messages(wait=not engine.has_work)
            if not self._running:
                break
            if not engine.has_work:
                continue
            events: list[EngineEvent] = list(engine.step())
            steps += 1
            if steps % _STATS_EVERY_STEPS == 0 or not engine.has_work:
                events.append(engine.stats())
            if events:
                self._send(events)
        engine.close()

    def _take_messages(self, wait: bool) -> None:
        """Acts on all messages that have come; without work, sleeps until one comes."""
        if not self._socket.poll(None if wait else 0):
            return
        while True:
            try:
                message = self._decoder.decode(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            if isinstance(message, EngineRequest):
                self._add(message)
            elif isinstance(message, AbortRequest):
                self._engine.abort(message.request_ids)
            elif isinstance(message, Shutdown):
                self._running = False

    def _add(self, request: EngineRequest) -> None:
        try:
            self._engine.add(request)
        except InvalidRequestError as error:
            self._send([refusal(request, error)])

    def _send(self, events: Sequence[EngineEvent]) -> None:
        self._socket.send(self._encoder.encode(events))
