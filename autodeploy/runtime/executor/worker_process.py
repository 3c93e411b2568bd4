"""What runs inside a worker: build the engine, then steps and messages in turn, until told."""

from __future__ import annotations

import os
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
    EngineReady,
    EngineRequest,
    FromFront,
    RequestFailed,
    Shutdown,
)
from .base import BuildEngine

_IDLE_MILLISECONDS = 500
_STATS_EVERY_STEPS = 16


def run_worker(address: str, parent: int, build: BuildEngine) -> None:
    """Entry point of the process. `parent`: when this process is gone, the worker ends too."""
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(address)
    try:
        _Worker(socket, parent, build()).run()
    except Exception as error:
        known = isinstance(error, AutodeployError)
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = (
            str(error)
            if known
            else (
                f"the engine's worker failed at {os.path.basename(where.filename)}:{where.lineno}: "
                f"{type(error).__name__}: {error}"
            )
        )
        died = EngineDied(message, type(error).__name__ if known else "EngineDeadError")
        socket.send(msgspec.msgpack.encode([died]))
        traceback.print_exc()
        raise SystemExit(1) from error
    finally:
        socket.close()
        context.term()


class _Worker:
    def __init__(self, socket: zmq.Socket[bytes], parent: int, engine: EngineCore) -> None:
        self._socket = socket
        self._parent = parent
        self._engine = engine
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromFront)
        self._running = True

    def run(self) -> None:
        engine = self._engine
        self._send(
            [
                EngineReady(
                    vocab_size=engine.vocab_size,
                    max_model_len=engine.max_model_len,
                    summary=engine.summary,
                )
            ]
        )
        steps = 0
        while self._running and os.getppid() == self._parent:
            self._take_messages(0 if engine.has_work else _IDLE_MILLISECONDS)
            if not engine.has_work:
                continue
            events: list[EngineEvent] = list(engine.step())
            steps += 1
            if steps % _STATS_EVERY_STEPS == 0 or not engine.has_work:
                events.append(engine.stats())
            if events:
                self._send(events)
        engine.close()

    def _take_messages(self, wait_milliseconds: int) -> None:
        if not self._socket.poll(wait_milliseconds):
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
            failed = RequestFailed(
                request_id=request.request_id, error=type(error).__name__, message=str(error)
            )
            self._send([failed])

    def _send(self, events: Sequence[EngineEvent]) -> None:
        self._socket.send(self._encoder.encode(events))
