"""RequestWatch: follows the outputs of one prompt into the metrics and the request's record.

    async for output in watched(llm.generate(prompt, params), metrics, params): ...

However the stream ends, the request is counted once: as finished, as aborted (the client left, or
the task was cancelled), as failed, or as refused.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import TracebackType

from ..async_llm import OutputKind
from ..errors import InvalidRequestError
from ..outputs import CompletionOutput, RequestOutput
from ..runtime.messages import RequestMetrics
from ..runtime.sampling_params import SamplingParams
from .metrics import ServerMetrics
from .record import RequestRecord, current_record


async def watched(
    outputs: AsyncGenerator[RequestOutput, None],
    metrics: ServerMetrics,
    params: SamplingParams,
    output_kind: OutputKind = "delta",
    engine: int = 0,
) -> AsyncGenerator[RequestOutput, None]:
    """The same outputs. params, output_kind: what they were asked for with. engine: its number."""
    with RequestWatch(metrics, params, output_kind, engine) as watch:
        # Closed here and now: an engine hears of a client that left by its stream's end.
        async with aclosing(outputs):
            async for output in outputs:
                watch.observe(output)
                yield output


class RequestWatch:
    """One prompt on its way, seen from the server. Lives on the event loop."""

    def __init__(
        self,
        metrics: ServerMetrics,
        params: SamplingParams,
        output_kind: OutputKind = "delta",
        engine: int = 0,
    ) -> None:
        self._model = metrics.model_name
        self._counts = metrics.requests[engine]
        self._params = params
        self._deltas = output_kind == "delta"
        self._record = current_record() or RequestRecord("")
        self._started = time.perf_counter()
        # Of each sequence: when its newest token came, and how many there are.
        self._seen: dict[int, tuple[float, int]] = {}
        self._timing: RequestMetrics | None = None
        self._reason: str | None = None
        self._ended = False
        self._whole = False
        """Whether all of the answer came at once."""

    def __enter__(self) -> RequestWatch:
        record, params = self._record, self._params
        record.model = self._model
        record.sequences += params.n
        record.max_tokens = params.max_tokens
        record.temperature, record.top_p = params.temperature, params.top_p
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._ended:
            return
        if isinstance(error, Exception):
            self._record.error = type(error).__name__
            if isinstance(error, InvalidRequestError):
                self._counts.refused += 1
                return
        # Cancelling and leaving a generator are no Exceptions.
        self._end("error" if isinstance(error, Exception) else "abort")

    def observe(self, output: RequestOutput) -> None:
        """Takes in what `AsyncLLM.generate` yielded. Hot: once per token streamed (1 µs)."""
        now = time.perf_counter()
        if output.metrics is not None:
            self._timing = output.metrics
        if output.embedding is not None:
            self._prompt(output)
        for part in output.outputs:
            self._tokens(part, output, now)
            if part.finish_reason is not None and part.index == 0:
                self._reason = part.finish_reason
        if output.finished:
            self._finish(now, len(output.prompt_token_ids))

    def _tokens(self, part: CompletionOutput, output: RequestOutput, now: float) -> None:
        seen = self._seen.get(part.index)
        count = len(part.token_ids)
        known = 0 if seen is None else seen[1]
        new = count if self._deltas else count - known
        if new <= 0:
            return
        if seen is not None:
            self._counts.inter_token.observe((now - seen[0]) / new, new)
        elif not self._seen:
            self._first_token(output, now)
        self._seen[part.index] = (now, known + new)
        self._record.output_tokens += new

    def _first_token(self, output: RequestOutput, now: float) -> None:
        seconds, timing = now - self._started, self._timing
        self._whole = output.finished
        if self._whole and timing is not None and timing.first_token_time is not None:
            # Only the engine saw the first token.
            seconds = timing.first_token_time - timing.arrival_time
        self._counts.first_token.observe(seconds)
        self._prompt(output)
        if self._record.first_token_seconds is None:
            self._record.first_token_seconds = seconds

    def _prompt(self, output: RequestOutput) -> None:
        """Counts the prompt, once something came of it."""
        record, tokens = self._record, len(output.prompt_token_ids)
        self._counts.prompt_tokens += tokens
        record.prompt_tokens += tokens
        if self._timing is not None:
            record.cached_tokens += self._timing.cached_tokens

    def _finish(self, now: float, prompt_tokens: int) -> None:
        counts = self._counts
        reason = self._reason or "error"
        self._end(reason)
        if reason not in ("stop", "length"):
            return  # how long it took says nothing of how long requests take
        counts.end_to_end.observe(now - self._started)
        counts.request_prompt_tokens.observe(prompt_tokens)
        counts.request_generation_tokens.observe(sum(count for _, count in self._seen.values()))
        counts.params_n.observe(self._params.n)
        if self._params.max_tokens is not None:
            counts.params_max_tokens.observe(self._params.max_tokens)
        if self._timing is not None:
            self._phases(self._timing)

    def _phases(self, timing: RequestMetrics) -> None:
        """What the engine's clock says of the first sequence."""
        counts = self._counts
        scheduled, first = timing.first_scheduled_time, timing.first_token_time
        if scheduled is None or first is None:
            return
        # One that ended at a stop string has no end in the engine: the server ended it, now.
        last = timing.finished_time or time.time()
        queue = scheduled - timing.arrival_time
        counts.queue.observe(queue)
        self._record.queue_seconds = queue
        counts.prefill.observe(first - scheduled)
        counts.decode.observe(last - first)
        counts.inference.observe(last - scheduled)
        tokens = self._seen[0][1] if 0 in self._seen else 0
        if tokens > 1:
            mean = (last - first) / (tokens - 1)
            counts.per_output_token.observe(mean)
            if self._whole:
                counts.inter_token.observe(mean, tokens - 1)

    def _end(self, reason: str) -> None:
        self._ended = True
        self._counts.finished[reason] += 1
        self._record.finish_reasons.append(reason)
