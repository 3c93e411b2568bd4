"""ActiveRequest: one prompt on its way, as the engine's events turn into a RequestOutput."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from . import errors
from .detokenizer import Detokenizer, decode
from .generation_defaults import GenerationDefaults
from .outputs import CompletionOutput, Logprob, RequestOutput
from .prompts import Prompt
from .runtime.messages import EngineRequest, RequestFailed, TokenLogprob, TokenOutput
from .runtime.random_stream import child_seed
from .runtime.sampling_params import SamplingParams


class ActiveRequest:
    """A prompt with its `n` sequences, each of them one request of the engine."""

    def __init__(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        tokenizer: Any,
        defaults: GenerationDefaults,
        *,
        seed: int,
        engine_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        streams: bool = True,
        pooling: str | None = None,
    ) -> None:
        """`engine_id`: the engine's name for it, if it must differ from `request_id`. `streams`:
        somebody looks at the output before it is complete. `pooling`: to embed, not to generate.

        Raises:
            SamplingParamsError: `params` need a tokenizer and there is none.
            InvalidRequestError: the engine could not be told one of the values.
        """
        _refuse_untellable(request_id, params, priority, cache_salt)
        self.request_id = request_id
        self.params = params
        self._tokenizer = tokenizer
        _require_tokenizer(params, tokenizer)
        _fill_bad_words(params, tokenizer)
        engine_id = request_id if engine_id is None else engine_id
        self.engine_requests = [
            EngineRequest(
                request_id=engine_id if params.n == 1 else f"{engine_id}:{index}",
                prompt_token_ids=prompt.token_ids,
                params=params,
                eos_token_ids=list(defaults.eos_token_ids),
                seed=child_seed(params.seed if params.seed is not None else seed, index),
                priority=priority,
                arrival_time=time.time(),
                cache_salt=cache_salt,
                prefilled=prompt.prefilled,
                pooling=pooling,
            )
            for index in range(params.n)
        ]
        self.output = RequestOutput(
            request_id,
            prompt.text,
            prompt.token_ids,
            [CompletionOutput(index) for index in range(params.n)],
        )
        with_text = tokenizer if params.detokenize else None
        self._text = [
            Detokenizer(
                with_text,
                prompt.token_ids,
                skip_special_tokens=params.skip_special_tokens,
                stop=params.stop_strings,
                include_stop=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
            )
            for _ in range(params.n)
        ]
        self.defers_text = not streams and not params.stop_strings
        """Whether nobody waits for a piece of text, and none matters: it is made at the end."""
        self._unread: list[list[int]] = [[] for _ in range(params.n)]
        # Of each sequence: tokens and characters given out, and whether its end was.
        self._streamed = [(0, 0, False) for _ in range(params.n)]

    @property
    def finished(self) -> bool:
        return self.output.finished

    def update(self, index: int, event: TokenOutput | RequestFailed) -> bool:
        """Takes in an event of sequence `index`.

        Returns whether the engine should stop it: its text completed a stop string.
        """
        completion = self.output.outputs[index]
        if completion.finished:
            return False  # what the engine made before it heard of the end
        stop = False
        try:
            if isinstance(event, RequestFailed):
                kind = getattr(errors, event.error, errors.EngineError)
                self._fail(completion, kind(event.message))
            else:
                stop = self._extend(index, completion, event)
            self._finish_text(index, completion)
        except errors.InvalidRequestError as error:
            self._fail(completion, errors.EngineError(f"request '{self.request_id}': {error}"))
            stop = True
        self.output.finished = all(c.finished for c in self.output.outputs)
        return stop

    def add_tokens(self, index: int, token_ids: Sequence[int]) -> None:
        """More tokens of sequence `index`, with nothing else to say of them; if `defers_text`."""
        completion = self.output.outputs[index]
        if completion.finish_reason is None:
            completion.token_ids += token_ids
            self._unread[index] += token_ids

    def _fail(self, completion: CompletionOutput, error: errors.AutodeployError) -> None:
        self.output.error = error
        completion.finish_reason = "error"

    def _finish_text(self, index: int, completion: CompletionOutput) -> None:
        text = self._text[index]
        if completion.finished and text.stop_reason is None:
            completion.text = text.finish()
            if text.stop_reason is not None:
                completion.finish_reason, completion.stop_reason = "stop", text.stop_reason

    def _extend(self, index: int, completion: CompletionOutput, event: TokenOutput) -> bool:
        text = self._text[index]
        if self._unread[index]:
            text.append(self._unread[index])
            self._unread[index].clear()
        kept = len(event.token_ids)
        # A stop token is one of the tokens; it is text only where stop strings are, too.
        silent = event.finish_reason == "stop" and not self.params.include_stop_str_in_output
        spoken = event.token_ids[:-1] if silent else event.token_ids
        count = text.append(spoken)
        if text.stop_reason is not None:
            kept = count
        completion.token_ids += event.token_ids[:kept]
        completion.text = text.text
        if event.logprobs is not None:
            self._add_logprobs(completion, event.logprobs[:kept])
        if event.prompt_logprobs is not None:
            self.output.prompt_logprobs = [
                None if entry is None else self._entry(entry) for entry in event.prompt_logprobs
            ]
        if event.metrics is not None and index == 0:
            self.output.metrics = event.metrics
        if event.embedding is not None:
            self.output.embedding = event.embedding
        if text.stop_reason is not None:
            completion.finish_reason, completion.stop_reason = "stop", text.stop_reason
            return event.finish_reason is None
        completion.finish_reason, completion.stop_reason = event.finish_reason, event.stop_reason
        return False

    def _add_logprobs(
        self, completion: CompletionOutput, logprobs: list[list[TokenLogprob]]
    ) -> None:
        if completion.logprobs is None:
            completion.logprobs, completion.cumulative_logprob = [], 0.0
        for candidates in logprobs:
            completion.logprobs.append(self._entry(candidates))
            completion.cumulative_logprob = (completion.cumulative_logprob or 0.0) + candidates[
                0
            ].logprob

    def _entry(self, candidates: list[TokenLogprob]) -> dict[int, Logprob]:
        return {
            c.token_id: Logprob(
                c.logprob,
                c.rank,
                None if self._tokenizer is None else decode(self._tokenizer, [c.token_id]),
            )
            for c in candidates
        }

    def end_all(self, error: errors.AutodeployError) -> None:
        """Ends every sequence that is still running with `error`."""
        for completion in self.output.outputs:
            if not completion.finished:
                completion.finish_reason = "error"
        self.output.error = error
        self.output.finished = True

    def snapshot(self) -> RequestOutput:
        """A copy of the output so far; what grows is copied, what does not is shared."""
        copies = [
            dataclasses.replace(
                c,
                token_ids=list(c.token_ids),
                logprobs=None if c.logprobs is None else list(c.logprobs),
            )
            for c in self.output.outputs
        ]
        return dataclasses.replace(self.output, outputs=copies)

    def delta(self) -> RequestOutput | None:
        """What is new since the last call, as a RequestOutput; None if nothing is."""
        parts = []
        for index, completion in enumerate(self.output.outputs):
            tokens, text, _ = self._streamed[index]
            new = CompletionOutput(
                index,
                completion.text[text:],
                completion.token_ids[tokens:],
                completion.cumulative_logprob,
                completion.logprobs[tokens:] if completion.logprobs else None,
                completion.finish_reason,
                completion.stop_reason,
            )
            now = (len(completion.token_ids), len(completion.text), completion.finished)
            if self._streamed[index] != now:
                self._streamed[index] = now
                parts.append(new)
        if not parts:
            return None
        return RequestOutput(
            self.request_id,
            self.output.prompt,
            self.output.prompt_token_ids,
            parts,
            self.output.finished,
            self.output.prompt_logprobs,
            self.output.metrics,
            self.output.error,
        )


def _refuse_untellable(
    request_id: str, params: SamplingParams, priority: int, cache_salt: str | None
) -> None:
    """Raises InvalidRequestError for what a message to the engine cannot hold."""
    if type(priority) is not int or not -(2**63) <= priority < 2**63:
        raise errors.InvalidRequestError(
            f"priority must be an integer of 64 bits, not {priority!r:.60}"
        )
    if cache_salt is not None and not isinstance(cache_salt, str):
        raise errors.InvalidRequestError(
            f"cache_salt must be a string or None, not {cache_salt!r:.60}"
        )
    texts = {
        "request_id": [request_id], "cache_salt": [cache_salt or ""],
        "stop": params.stop_strings, "bad_words": params.bad_words or [],
    }  # fmt: skip
    for name, values in texts.items():
        for value in values:
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise errors.InvalidRequestError(
                    f"{name} has {value!a:.60}, which is not valid Unicode: {error.reason}"
                ) from error


def _require_tokenizer(params: SamplingParams, tokenizer: Any) -> None:
    if tokenizer is not None:
        return
    if params.stop_strings:
        raise errors.SamplingParamsError(
            "stop strings need a tokenizer: pass tokenizer=... to deploy, or use stop_token_ids"
        )
    if params.bad_words and not params.bad_words_token_ids:
        raise errors.SamplingParamsError(
            "bad_words needs a tokenizer: pass tokenizer=... to deploy, or bad_words_token_ids"
        )


def _fill_bad_words(params: SamplingParams, tokenizer: Any) -> None:
    """Token sequences of every bad word, at the start of a text and after a space."""
    if not params.bad_words or params.bad_words_token_ids:
        return
    found = []
    for word in params.bad_words:
        for text in (word, " " + word.lstrip()):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if ids and ids not in found:
                found.append(ids)
    params.bad_words_token_ids = found
    params.validate()
