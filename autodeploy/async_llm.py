"""AsyncLLM: the same engine for asyncio: streams that can be left, cancelled or aborted.

One background thread owns the executor: it submits, aborts and polls. Everything that touches a
request's text happens there too; the event loop only receives finished pieces.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import logging
import random
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

from .active_request import ActiveRequest
from .chat import chat_prompts
from .config import DeployConfig
from .embedding import embedded, embedding_params
from .errors import AutodeployError, EngineDeadError, InvalidRequestError
from .generation_defaults import GenerationDefaults, defaults_of
from .launch import build_executor
from .llm import resolve_tokenizer, shut_down_on_error
from .output_stream import Item, OutputKind, OutputStream, hand_out
from .outputs import EmbeddingRequestOutput, RequestOutput
from .pooling import Pooling
from .prompts import check_prompt, params_for_each, read_prompts, require_task
from .runtime.executor import Executor, dead_error
from .runtime.logits import refuse_unknown_tokens
from .runtime.messages import (
    EngineDied,
    EngineReady,
    EngineStats,
    RequestFailed,
    TokenBatch,
    TokenOutput,
)
from .runtime.sampling_params import SamplingParams
from .structured_check import StructuredCheck

_log = logging.getLogger("autodeploy")
_POLL_SECONDS = 10.0


class AsyncLLM:
    """A deployed model for asyncio. Constructor as `LLM`; building it blocks."""

    def __init__(
        self, model: Any, *, tokenizer: Any = None, recipe: Any = "default", **options: Any
    ) -> None:
        self._closed = True
        config = DeployConfig.from_options(
            model, {"tokenizer": tokenizer, "recipe": recipe, **options}
        )
        executor = build_executor(config)
        with shut_down_on_error(executor):
            tokenizer = resolve_tokenizer(config)
            defaults = defaults_of(config.model, tokenizer, config.trust_remote_code)
            self._start(executor, tokenizer, defaults, config.seed)

    @classmethod
    def from_parts(
        cls, executor: Executor, tokenizer: Any = None, model: Any = None, seed: int = 0
    ) -> AsyncLLM:
        """An AsyncLLM over an executor that is already running."""
        llm = cls.__new__(cls)
        defaults = GenerationDefaults() if model is None else defaults_of(model, tokenizer)
        llm._start(executor, tokenizer, defaults, seed)
        return llm

    def _start(
        self, executor: Executor, tokenizer: Any, defaults: GenerationDefaults, seed: int
    ) -> None:
        self._executor = executor
        self.tokenizer = tokenizer
        self.defaults = defaults
        self.stats = EngineStats()
        self._structured = StructuredCheck(tokenizer, self.vocab_size, defaults.eos_token_ids)
        self._ids = itertools.count()
        self._seeds = random.Random(seed)
        self._streams: dict[str, OutputStream] = {}
        self._children: dict[str, tuple[OutputStream, int]] = {}
        # Of streams opened, of what came out of them, of streams ended. Each has one writer at a
        # time (the last two: the background thread), so that a token costs no lock.
        self._tokens_in = self._tokens_out = self._tokens_gone = 0
        self._commands: deque[Callable[[], None]] = deque()
        # Held while streams are opened or forgotten: none may slip in behind the engine's death.
        self._lock = threading.Lock()
        self._dead: AutodeployError | None = None
        self._death: concurrent.futures.Future[AutodeployError] = concurrent.futures.Future()
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
    def task(self) -> str:
        """What the model was deployed for: generate, or embed."""
        return self._executor.ready.task

    @property
    def summary(self) -> dict[str, str]:
        """What was built: the rung of the ladder, the recipe, match counts, times."""
        return self._executor.ready.summary

    @property
    def open_requests(self) -> int:
        """Streams that have not ended."""
        return len(self._streams)

    @property
    def open_tokens(self) -> int:
        """Tokens of the streams that have not ended, running and waiting: what the engine holds or
        is about to. A prompt counts once per sequence, whether it is cached or not."""
        return self._tokens_in + self._tokens_out - self._tokens_gone

    @property
    def ready(self) -> EngineReady:
        """What the engine said of itself when it was built."""
        return self._executor.ready

    @property
    def death(self) -> AutodeployError | None:
        """Why no request can be served any more; None while one can."""
        return self._dead

    async def died(self) -> AutodeployError:
        """Waits until the engine is gone, by itself or by `shutdown`; returns why."""
        return await asyncio.shield(asyncio.wrap_future(self._death))

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        output_kind: OutputKind = "delta",
        priority: int = 0,
        cache_salt: str | None = None,
        pooling: Pooling | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Streams one prompt's outputs.

        output_kind: delta gives what is new, cumulative everything so far, final only the end. Who
        reads more slowly than the engine writes gets several tokens at a time.
        pooling: embeds instead (see `embed`): the only output has the vector, not normalized.
        Leaving the loop early, or cancelling the task, aborts the request.

        Raises:
            InvalidRequestError: before anything is submitted.
            EngineError: the request failed, or (EngineDeadError) the engine is gone.
        """
        await self._structured.check_aside(sampling_params)
        if pooling is not None:
            sampling_params, output_kind = embedding_params(pooling), "final"
        require_task("generate" if pooling is None else "embed", self.task)
        stream = self._open(
            prompt, sampling_params, request_id, output_kind, priority, cache_salt, pooling
        )
        try:
            while True:
                output = await stream.next()
                yield output
                if output.finished:
                    return
        finally:
            if not stream.active.finished:
                self._post(lambda: self._abort_now(stream))

    async def embed(
        self,
        prompt: Any,
        request_id: str | None = None,
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        dimensions: int | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> EmbeddingRequestOutput:
        """One prompt's vector; arguments as of `LLM.embed`.

        Raises:
            InvalidRequestError: the prompt cannot be served, or the model generates.
            EngineError: the prompt failed, or (EngineDeadError) the engine is gone.
        """
        outputs = self.generate(
            prompt, None, request_id, priority=priority, cache_salt=cache_salt, pooling=pooling
        )
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                return embedded(output, normalize, dimensions)
        raise AssertionError("a stream ended without an output")

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> AsyncIterator[RequestOutput]:
        """Streams the next message of one conversation, by the tokenizer's chat template.

        options: the keywords of `generate`.

        Raises:
            InvalidRequestError: there is no tokenizer or no chat template, or it refuses.
        """
        prompts = chat_prompts(
            self.tokenizer, messages, add_generation_prompt, chat_template, chat_template_kwargs
        )
        if len(prompts) != 1:
            raise InvalidRequestError(
                f"AsyncLLM.chat takes one conversation, not {len(prompts)}; call it for each"
            )
        return self.generate(prompts[0], sampling_params, request_id, **options)

    async def abort(self, request_id: str) -> None:
        """Ends a request; its stream ends with finish_reason 'abort'. Unknown ids are ignored."""
        stream = self._streams.get(request_id)
        if stream is not None:
            self._post(lambda: self._abort_now(stream))

    async def shutdown(self) -> None:
        """Ends every stream with EngineDeadError, stops the engine and frees its memory."""
        self._closed = True
        self._executor.wake()
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
        pooling: str | None = None,
    ) -> OutputStream:
        self._require_open()
        if kind not in ("delta", "cumulative", "final"):
            raise InvalidRequestError(
                f"output_kind must be delta, cumulative or final, not {kind!r}"
            )
        if request_id is not None and not isinstance(request_id, str):
            raise InvalidRequestError(f"request_id must be a string, not {request_id!r:.60}")
        read = read_prompts(prompt, self.tokenizer)
        if len(read) != 1:
            raise InvalidRequestError(f"AsyncLLM.generate takes one prompt, not {len(read)}")
        check_prompt(read[0], 0, self.vocab_size, self.max_model_len)
        (own,) = params_for_each(params, 1, self.defaults.params())
        number = next(self._ids)
        name = request_id if request_id is not None else f"async-{number}"
        active = ActiveRequest(
            name, read[0], own, self.tokenizer, self.defaults,
            # The engine may still report the end of an earlier request of the same name.
            engine_id=f"{number}/{name}",
            seed=self._seeds.getrandbits(63), priority=priority, cache_salt=salt,
            streams=kind != "final", pooling=pooling,
        )  # fmt: skip
        refuse_unknown_tokens(own, self.vocab_size)
        tokens = own.n * len(read[0].token_ids)
        stream = OutputStream(active, kind, tokens)
        with self._lock:
            self._require_open()
            if name in self._streams:
                raise InvalidRequestError(
                    f"request id '{name}' is in use; give each request its own"
                )
            self._streams[name] = stream
            self._tokens_in += tokens
            self._post(lambda: self._submit_now(stream))
        return stream

    def _require_open(self) -> None:
        if self._dead is not None:
            raise self._dead
        if self._closed:
            raise _shut_down()

    def _post(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        # Behind another one it needs no wake-up of its own: all that wait are done at once.
        if len(self._commands) == 1:
            self._executor.wake()

    # What follows runs in the background thread.

    def _serve(self) -> None:
        try:
            while not self._closed and self._dead is None:
                while self._commands:
                    self._commands.popleft()()
                self._take(self._executor.poll(_POLL_SECONDS))
            self._die(self._dead or _shut_down())
        except AutodeployError as error:
            self._die(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, every stream must hear of it
            _log.debug("the thread that serves the streams failed", exc_info=error)
            self._die(EngineDeadError(f"serving failed: {type(error).__name__}: {error}"))
        self._executor.shutdown()

    def _submit_now(self, stream: OutputStream) -> None:
        for index, request in enumerate(stream.active.engine_requests):
            self._children[request.request_id] = (stream, index)
            self._executor.submit(request)

    def _abort_now(self, stream: OutputStream) -> None:
        if not stream.active.finished:
            self._executor.abort([r.request_id for r in stream.active.engine_requests])

    def _take(self, events: list[Any]) -> None:
        stopped: list[str] = []
        touched: dict[int, OutputStream] = {}
        for event in self._after_unread(events):
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
            if isinstance(event, TokenOutput):
                stream.tokens += len(event.token_ids)
                self._tokens_out += len(event.token_ids)
            if stream.active.update(index, event):
                stopped.append(event.request_id)
            touched[id(stream)] = stream
        if stopped:
            self._executor.abort(stopped)
        hand_out([found for s in touched.values() if (found := self._published(s)) is not None])

    def _after_unread(self, events: list[Any]) -> Iterator[Any]:
        """The events, without tokens that nobody reads before their request ends: those are kept.

        Making text of them one by one costs more than all else that is done for a token here.
        """
        for event in events:
            if not isinstance(event, TokenBatch):
                yield event
                continue
            for request_id, token_id in zip(event.request_ids, event.token_ids, strict=True):
                stream, index = self._children.get(request_id, (None, 0))
                if stream is not None and stream.active.defers_text:
                    stream.active.add_tokens(index, (token_id,))
                    stream.tokens += 1
                    self._tokens_out += 1
                elif stream is not None:
                    yield TokenOutput(request_id=request_id, token_ids=[token_id])

    def _published(self, stream: OutputStream) -> tuple[OutputStream, Item] | None:
        """What the reader of a stream hears now; None if that is nothing."""
        active = stream.active
        if active.output.error is not None:
            # Its other sequences have nobody to go to.
            self._executor.abort([r.request_id for r in active.engine_requests])
            return self._ended_with(stream, active.output.error)
        if active.finished:
            # Before its reader knows: the name is free for the reader's next request.
            self._forget(stream)
        output: RequestOutput | None = None
        if stream.kind == "delta":
            output = active.delta()
        elif stream.kind == "cumulative" or active.finished:
            output = active.snapshot()
        return None if output is None else (stream, output)

    def _ended_with(
        self, stream: OutputStream, error: AutodeployError
    ) -> tuple[OutputStream, Item]:
        stream.active.end_all(error)
        self._forget(stream)
        return stream, error

    def _forget(self, stream: OutputStream) -> None:
        with self._lock:
            if self._streams.pop(stream.active.request_id, None) is not None:
                self._tokens_gone += stream.tokens
        for request in stream.active.engine_requests:
            self._children.pop(request.request_id, None)

    def _die(self, error: AutodeployError) -> None:
        with self._lock:
            self._dead = error
            self._commands.clear()
            streams = list(self._streams.values())
        hand_out([self._ended_with(stream, error) for stream in streams])
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self._death.set_result(error)


def _shut_down() -> EngineDeadError:
    return EngineDeadError("this AsyncLLM was shut down; deploy the model again")
