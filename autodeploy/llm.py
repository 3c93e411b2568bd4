"""LLM: prompts in, finished outputs out. The name and the manners of vLLM's and TensorRT-LLM's."""

from __future__ import annotations

import itertools
import logging
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import nn

from .active_request import ActiveRequest
from .beam_search import BeamSearchOutput, BeamSearchParams, search
from .chat import chat_prompts
from .checkpoint import load_tokenizer
from .config import DeployConfig
from .custom_ops.cost import Cost
from .embedding import embedded, embedding_params
from .errors import AutodeployError, ConfigError, EngineDeadError
from .generation_defaults import GenerationDefaults, defaults_of
from .held_tokens import Children, HeldTokens
from .launch import build_executor
from .outputs import EmbeddingRequestOutput, RequestOutput
from .pooling import Pooling
from .progress import progress_bar
from .prompts import (
    check_prompt,
    params_for_each,
    read_prompts,
    refusals_name_prompt,
    require_task,
)
from .runtime.executor import Executor, dead_error
from .runtime.logits import refuse_unknown_tokens
from .runtime.messages import EngineDied, EngineStats, RequestFailed, TokenBatch, TokenOutput
from .runtime.sampling_params import SamplingParams
from .structured_check import StructuredCheck

_log = logging.getLogger("autodeploy")
_POLL_SECONDS = 0.5


class LLM:
    """A deployed model.

    model: a live `AutoModelForCausalLM`, a checkpoint directory, or a hub id.
    options: fields of `DeployConfig`.

    Raises:
        ConfigError: an option or the recipe is wrong; nothing has been loaded.
        ModelError: the model cannot be loaded or served.
    """

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
    ) -> LLM:
        """An LLM over an executor that is already running. `model`: whose defaults apply."""
        llm = cls.__new__(cls)
        defaults = GenerationDefaults() if model is None else defaults_of(model, tokenizer)
        llm._start(executor, tokenizer, defaults, seed)
        return llm

    def _start(
        self, executor: Executor, tokenizer: Any, defaults: GenerationDefaults, seed: int
    ) -> None:
        self._executor = executor
        self._closed = False
        self.tokenizer = tokenizer
        self.defaults = defaults
        self._structured = StructuredCheck(tokenizer, self.vocab_size, defaults.eos_token_ids)
        self._ids = itertools.count()
        self._seeds = random.Random(seed)
        # Events go to whoever polls, so calls from several threads take turns.
        self._turn = threading.Lock()
        self.stats = EngineStats()
        """Counters of the engine, as of the last step reported."""

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt and output together."""
        return self._executor.ready.max_model_len

    @property
    def vocab_size(self) -> int:
        return self._executor.ready.vocab_size

    @property
    def summary(self) -> dict[str, str]:
        """What was built: the rung of the ladder, the recipe, match counts, times."""
        return self._executor.ready.summary

    @property
    def cost(self) -> Cost | None:
        """What a step must read and compute (`transforms/cost`); None if it cannot be counted."""
        return self._executor.ready.cost

    def get_tokenizer(self) -> Any:
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What a request without SamplingParams gets."""
        return self.defaults.params()

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] | None = None,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Generates for every prompt; returns outputs in the order of the prompts.

        prompts: text, token ids, a dict with `prompt` or `prompt_token_ids`, or a list of those.
        sampling_params: one for all, or one per prompt; None takes the checkpoint's defaults.
        use_tqdm: a progress bar, if standard error is a terminal.
        priority: lower runs first, one for all or one per prompt; None is 0.

        Raises:
            InvalidRequestError: a prompt or its parameters cannot be served; none was submitted.
            EngineDeadError: the engine is gone.
            EngineError: the only prompt failed. Of several, those that failed have `error` set.
        """
        self._require_open()
        require_task("generate", self._executor.ready.task)
        active = self._prepare(prompts, sampling_params, priority, cache_salt)
        self._run(active, use_tqdm)
        failed = [a.output.error for a in active if a.output.error is not None]
        if failed and len(failed) == len(active):
            raise failed[0]
        for error in failed:
            _log.error("%s", error)
        return [a.output for a in active]

    def embed(
        self,
        prompts: Any,
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        dimensions: int | None = None,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """One vector for every prompt, of a model deployed with task='embed'.

        prompts: as of `generate`. pooling: the last token's hidden state, or the mean of all.
        normalize: to length 1. dimensions: how many leading numbers to keep, before that.

        Raises:
            InvalidRequestError: a prompt cannot be served, or the model generates.
            EngineError: a prompt failed, or (EngineDeadError) the engine is gone.
        """
        self._require_open()
        require_task("embed", self._executor.ready.task)
        active = self._prepare(prompts, embedding_params(pooling), None, None, pooling)
        self._run(active, use_tqdm)
        for each in active:
            if each.output.error is not None:
                raise each.output.error
        return [embedded(each.output, normalize, dimensions) for each in active]

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generates the next message of one conversation or of several.

        messages: a list of {"role", "content"} dicts, or a list of such lists.

        Raises:
            InvalidRequestError: there is no tokenizer or no chat template, or it refuses.
        """
        prompts = chat_prompts(
            self.tokenizer, messages, add_generation_prompt, chat_template, chat_template_kwargs
        )
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def beam_search(self, prompts: Any, params: BeamSearchParams) -> list[BeamSearchOutput]:
        """The `beam_width` most likely continuations of every prompt, best first.

        Each step asks the engine for one token of every beam; their prefixes come from the
        prefix cache, so recurrent models, which have none, compute each beam again every step.
        """
        self._require_open()
        if not isinstance(params, BeamSearchParams):
            raise ConfigError(f"beam_search takes BeamSearchParams, not {type(params).__name__}")
        read = read_prompts(prompts, self.tokenizer)
        for index, prompt in enumerate(read):
            check_prompt(prompt, index, self.vocab_size, self.max_model_len)
        return search(self, read, params)

    def shutdown(self) -> None:
        """Stops the engine and frees its memory; may be called again."""
        if not self._closed:
            self._closed = True
            self._executor.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.shutdown()

    def _require_open(self) -> None:
        if self._closed:
            raise EngineDeadError("this LLM was shut down; deploy the model again")

    def _prepare(
        self,
        prompts: Any,
        params: Any,
        priority: int | Sequence[int] | None,
        salt: str | None,
        pooling: str | None = None,
    ) -> list[ActiveRequest]:
        read = read_prompts(prompts, self.tokenizer)
        for index, prompt in enumerate(read):
            check_prompt(prompt, index, self.vocab_size, self.max_model_len)
        each = params_for_each(params, len(read), self.defaults.params())
        priorities = _priority_of_each(priority, len(read))
        active = []
        for index, (prompt, own) in enumerate(zip(read, each, strict=True)):
            with refusals_name_prompt(index):
                request = ActiveRequest(
                    str(next(self._ids)), prompt, own, self.tokenizer, self.defaults,
                    seed=self._seeds.getrandbits(63), priority=priorities[index], cache_salt=salt,
                    streams=False, pooling=pooling,
                )  # fmt: skip
                refuse_unknown_tokens(own, self.vocab_size)
                self._structured.check(own)
            active.append(request)
        return active

    def _run(self, active: Sequence[ActiveRequest], show_progress: bool) -> None:
        with self._turn:
            self._run_alone(active, show_progress)

    def _run_alone(self, active: Sequence[ActiveRequest], show_progress: bool) -> None:
        children = {
            request.request_id: (owner, index)
            for owner in active
            for index, request in enumerate(owner.engine_requests)
        }
        submitted: list[str] = []
        try:
            for owner in active:
                for request in owner.engine_requests:
                    # Noted first: an interrupt may come while it is submitted.
                    submitted.append(request.request_id)
                    self._executor.submit(request)
            with progress_bar(len(active), show_progress) as progress:
                self._poll_until_done(active, children, progress)
        except BaseException as error:
            # Ctrl-C, for one: nothing of this call stays behind.
            if not isinstance(error, EngineDeadError):
                self._executor.abort(submitted)
            raise

    def _poll_until_done(
        self,
        active: Sequence[ActiveRequest],
        children: Children,
        progress: Any,
    ) -> None:
        open_requests = sum(not owner.finished for owner in active)
        held = HeldTokens(children)
        while open_requests:
            stopped: list[str] = []
            for event in self._executor.poll(_POLL_SECONDS):
                if isinstance(event, EngineDied):
                    raise self._died(event, active)
                if isinstance(event, EngineStats):
                    self.stats = event
                elif isinstance(event, TokenBatch):
                    progress.tokens(len(event.token_ids))
                    for output in held.add(event):
                        open_requests -= _update(output, children, stopped, progress)
                elif isinstance(event, (TokenOutput, RequestFailed)):
                    held.hand_out()
                    if isinstance(event, TokenOutput):
                        progress.tokens(len(event.token_ids))
                    open_requests -= _update(event, children, stopped, progress)
            if stopped:
                self._executor.abort(stopped)

    def _died(self, event: EngineDied, active: Sequence[ActiveRequest]) -> AutodeployError:
        error = dead_error(event)
        for owner in active:
            if not owner.finished:
                owner.end_all(error)
        return error


def _update(
    event: TokenOutput | RequestFailed, children: Children, stopped: list[str], progress: Any
) -> int:
    """Gives a request its event; returns 1 if that ended all of it, else 0."""
    if event.request_id not in children:
        return 0  # the end of a request that an earlier call aborted
    owner, index = children[event.request_id]
    was_finished = owner.finished
    if owner.update(index, event):
        stopped.append(event.request_id)
    if not owner.finished or was_finished:
        return 0
    progress.finished()
    return 1


def _priority_of_each(priority: int | Sequence[int] | None, count: int) -> list[int]:
    if priority is None or isinstance(priority, int):
        return [priority or 0] * count
    each = list(priority)
    if len(each) != count or not all(isinstance(p, int) for p in each):
        raise ConfigError(
            f"priority must be an integer, or one for each of {count} prompts, not {each!r:.60}"
        )
    return each


@contextmanager
def shut_down_on_error(executor: Executor) -> Iterator[None]:
    """Stops an engine that nobody would be left to stop."""
    try:
        yield
    except BaseException:
        executor.shutdown()
        raise


def resolve_tokenizer(config: DeployConfig) -> Any:
    """The tokenizer object a config asks for; None if the model is live and none was given."""
    if config.tokenizer is None:
        if isinstance(config.model, nn.Module):
            return None
        return load_tokenizer(config.model, config.trust_remote_code, required=False)
    if isinstance(config.tokenizer, str) or hasattr(config.tokenizer, "__fspath__"):
        return load_tokenizer(config.tokenizer, config.trust_remote_code)
    return config.tokenizer
