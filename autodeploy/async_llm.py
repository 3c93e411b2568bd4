"""AsyncLLM: the same engine for asyncio: streams that can be left, cancelled or aborted.

One background thread owns the executor: it submits, aborts and polls. Everything that touches a
request's text happens there too; the event loop only receives finished pieces.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from .active_request import ActiveRequest
from .chat import chat_prompts
from .config import DeployConfig
from .errors import AutodeployError, EngineDeadError, InvalidRequestError
from .generation_defaults import GenerationDefaults, defaults_of
from .launch import build_executor
from .llm import resolve_tokenizer
from .outputs import RequestOutput
from .prompts import check_prompt, params_for_each, read_prompts
from .runtime.executor import Executor, dead_error
from .runtime.messages import EngineDied, EngineStats, RequestFailed, TokenOutput
from .runtime.sampling_params import SamplingParams

OutputKind = Literal["delta", "cumulative", "final"]
_POLL_SECONDS = 0.02
_IDLE_SECONDS = 0.5


@dataclass
class _Stream:
    active: ActiveRequest
    kind: OutputKind
    queue: asyncio.Queue[RequestOutput | AutodeployError]
    loop: asyncio.AbstractEventLoop

    def put(self, item: RequestOutput | AutodeployError) -> None:
        # A closed loop has nobody left to tell.
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)


class AsyncLLM:
    """A deployed model for asyncio. Constructor as `LLM`; building it blocks."""

    def __init__(
        self, model: Any, *, tokenizer: Any = None, recipe: Any = "default", **options: Any
    ) -> None:
        self._closed = True
        config = DeployConfig.from_options(
            model, {"tokenizer": tokenizer, "recipe": recipe, **options}
        )
        self._start(build_executor(config), resolve_tokenizer(config), config.model, config.seed)

    @classmethod
    def from_parts(
        cls, executor: Executor, tokenizer: Any = None, model: Any = None, seed: int = 0
    ) -> AsyncLLM:
        """An AsyncLLM over an executor that is already running."""
        llm = cls.__new__(cls)
        llm._start(executor, tokenizer, model, seed)
        return llm

    def _start(self, executor: Executor, tokenizer: Any, model: Any, seed: int) -> None:
        self._executor = executor
        self.tokenizer = tokenizer
        self.defaults = GenerationDefaults() if model is None else defaults_of(model, tokenizer)
        self.stats = EngineStats()
        self._ids = itertools.count()
        self._seeds = random.Random(seed)
        self._streams: dict[str, _Stream] = {}
        self._children: dict[str, tuple[_Stream, int]] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._dead: AutodeployError | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="autodeploy", daemon=True)
        self._thread.start()

    @property
    def max_model_len(self) -> int:
        return self._executor.ready.max_model_len

    @property
    def vocab_size(self) -> int:
        return self._executor.ready.vocab_size

    @property
    def open_requests(self) -> int:
        """Streams that have not ended."""
        return len(self._streams)

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        output_kind: OutputKind = "delta",
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Streams one prompt's outputs.

        output_kind: delta gives what is new, cumulative everything so far, final only the end.
        Leaving the loop early, or cancelling the task, aborts the request.

        Raises:
            InvalidRequestError: before anything is submitted.
            EngineError: the request failed, or (EngineDeadError) the engine is gone.
        """
        stream = self._open(prompt, sampling_params, request_id, output_kind, priority, cache_salt)
        try:
            while True:
                item = await stream.queue.get()
                if isinstance(item, AutodeployError):
                    raise item
                yield item
                if item.finished:
                    return
        finally:
            if not stream.active.finished:
                self._post(lambda: self._abort_now(stream.active.request_id))

    def chat(
        self, messages: Any, sampling_params: SamplingParams | None = None, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        """Streams the next message of one conversation, by the tokenizer's chat template."""
        (prompt,) = chat_prompts(self.tokenizer, messages)
        return self.generate(prompt, sampling_params, **options)

    async def abort(self, request_id: str) -> None:
        """Ends a request; its stream ends with finish_reason 'abort'. Unknown ids are ignored."""
        self._post(lambda: self._abort_now(request_id))

    async def shutdown(self) -> None:
        """Ends every stream with EngineDeadError, stops the engine and frees its memory."""
        if not self._closed:
            self._closed = True
            self._wake.set()
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.shutdown()

    def _open(
        self,
        prompt: Any,
        params: SamplingParams | None,
        request_id: str | None,
        kind: OutputKind,
        priority: int,
        salt: str | None,
    ) -> _Stream:
        if self._dead is not None:
            raise self._dead
        if self._closed:
            raise EngineDeadError("this AsyncLLM was shut down; deploy the model again")
        if kind not in ("delta", "cumulative", "final"):
            raise InvalidRequestError(
                f"output_kind must be delta, cumulative or final, not {kind!r}"
            )
        read = read_prompts(prompt, self.tokenizer)
        if len(read) != 1:
            raise InvalidRequestError(f"AsyncLLM.generate takes one prompt, not {len(read)}")
        check_prompt(read[0], 0, self.vocab_size, self.max_model_len)
        (own,) = params_for_each(params, 1, self.defaults.params())
        name = request_id if request_id is not None else f"async-{next(self._ids)}"
        if name in self._streams:
            raise InvalidRequestError(f"request id '{name}' is in use; give each request its own")
        active = ActiveRequest(
            name, read[0], own, self.tokenizer, self.defaults,
            seed=self._seeds.getrandbits(63), priority=priority, cache_salt=salt,
        )  # fmt: skip
        stream = _Stream(active, kind, asyncio.Queue(), asyncio.get_running_loop())
        self._streams[name] = stream
        self._post(lambda: self._submit_now(stream))
        return stream

    def _post(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._wake.set()

    # What follows runs in the background thread.

    def _serve(self) -> None:
        while not self._closed and self._dead is None:
            while self._commands:
                self._commands.popleft()()
            if not self._children:
                # Idle: sleep until a command comes, waking now and then to notice a death.
                self._wake.wait(_IDLE_SECONDS)
                self._wake.clear()
            try:
                events = self._executor.poll(_POLL_SECONDS if self._children else 0.0)
            except AutodeployError as error:
                self._die(error)
                break
            self._take(events)
        if self._dead is None:
            self._die(EngineDeadError("this AsyncLLM was shut down; deploy the model again"))
        self._executor.shutdown()

    def _submit_now(self, stream: _Stream) -> None:
        for index, request in enumerate(stream.active.engine_requests):
            self._children[request.request_id] = (stream, index)
            try:
                self._executor.submit(request)
            except AutodeployError as error:
                self._end_with(stream, error)
                return

    def _abort_now(self, request_id: str) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            self._executor.abort([r.request_id for r in stream.active.engine_requests])

    def _take(self, events: list[Any]) -> None:
        stopped: list[str] = []
        touched: dict[int, _Stream] = {}
        for event in events:
            if isinstance(event, EngineDied):
                self._die(dead_error(event))
                return
            if isinstance(event, EngineStats):
                self.stats = event
            if not isinstance(event, (TokenOutput, RequestFailed)):
                continue
            if event.request_id not in self._children:
                continue  # the end of a stream that has been given up
            stream, index = self._children[event.request_id]
            if stream.active.update(index, event):
                stopped.append(event.request_id)
            touched[id(stream)] = stream
        if stopped:
            self._executor.abort(stopped)
        for stream in touched.values():
            self._publish(stream)

    def _publish(self, stream: _Stream) -> None:
        active = stream.active
        if active.output.error is not None:
            self._end_with(stream, active.output.error)
            return
        if stream.kind == "delta":
            delta = active.delta()
            if delta is not None:
                stream.put(delta)
        elif stream.kind == "cumulative" or active.finished:
            stream.put(active.snapshot())
        if active.finished:
            self._forget(stream)

    def _end_with(self, stream: _Stream, error: AutodeployError) -> None:
        stream.active.end_all(error)
        stream.put(error)
        self._forget(stream)

    def _forget(self, stream: _Stream) -> None:
        self._streams.pop(stream.active.request_id, None)
        for request in stream.active.engine_requests:
            self._children.pop(request.request_id, None)

    def _die(self, error: AutodeployError) -> None:
        self._dead = error
        while self._commands:
            self._commands.popleft()
        for stream in list(self._streams.values()):
            self._end_with(stream, error)
