"""EngineCore: requests in, tokens out, one step at a time.

    plan = scheduler.schedule()      which tokens to compute
    logits = runner.forward(inputs)  one packed batch of them
    result = sampler.sample(logits)  one token per request that has all its tokens computed
    scheduler.commit(plan)           pages are full, the next step may share them

It knows nothing of text, sockets or threads: an executor hosts it, a front feeds it.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor

from autodeploy.custom_ops.contract import Contract
from autodeploy.errors import (
    EmptyPromptError,
    EngineError,
    InvalidRequestError,
    PromptTooLongError,
    UnknownTokenError,
)

from .batch import StepInputs, StepPlan
from .caches import plan_caches
from .memory import memory_for_caches
from .messages import EngineRequest, EngineStats, RequestFailed, TokenLogprob, TokenOutput
from .request import RequestState
from .runner import ModelRunner
from .sampler import Sampler, SampleResult
from .scheduler import Scheduler, SchedulerConfig

logger = logging.getLogger(__name__)


class TokenSampler(Protocol):
    """What the engine needs of a sampler; `sampler.Sampler` is the one."""

    def add(self, row: int, request: EngineRequest) -> None: ...
    def remove(self, row: int) -> None: ...
    def append(self, row: int, token_id: int) -> None: ...
    def sample(self, logits: Tensor, rows: Sequence[int] | np.ndarray) -> SampleResult: ...
    def prompt_logprobs(
        self, logits: Tensor, next_token_ids: Sequence[int], k: int
    ) -> list[list[TokenLogprob]]: ...


@dataclass(frozen=True)
class EngineConfig:
    """How one engine schedules and what its caches may take."""

    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    kv_cache_memory_bytes: int | None = None
    """For all caches together; None: what a measured step leaves of the GPU, or a quarter of the
    free host memory; less if that is enough for max_num_seqs sequences of max_model_len."""
    gpu_memory_utilization: float = 0.92
    """Fraction of a GPU's memory that weights, steps and caches may take."""
    num_pages: int | Mapping[str, int] | None = None
    """Pages of each cache group, instead of what the memory gives."""


def _within(config: SchedulerConfig, contract: Contract) -> SchedulerConfig:
    """The budget of a step, no larger than the program's graph holds for."""
    limit = contract.max_tokens
    if limit is None or config.max_num_batched_tokens <= limit:
        return config
    logger.warning(
        "the model's graph holds for %d tokens in one step: max_num_batched_tokens=%d is lowered "
        "to that", limit, config.max_num_batched_tokens,
    )  # fmt: skip
    return dataclasses.replace(
        config, max_num_batched_tokens=limit, max_num_seqs=min(config.max_num_seqs, limit)
    )


class EngineCore:
    """Serves requests with one model.

    Args:
        runner: the model; its caches are allocated here.
        config: budgets.
        sampler: None makes the usual one.

    Raises:
        ConfigError, OutOfMemoryError: see `caches.plan_caches`.
    """

    def __init__(
        self, runner: ModelRunner, config: EngineConfig, sampler: TokenSampler | None = None
    ) -> None:
        contract = runner.contract
        scheduler = _within(config.scheduler, contract)
        memory = config.kv_cache_memory_bytes
        if memory is None and config.num_pages is None:
            memory = memory_for_caches(runner, scheduler, config.gpu_memory_utilization)
        caches = plan_caches(contract, scheduler, memory, config.num_pages)
        scheduler = dataclasses.replace(scheduler, max_num_seqs=caches.num_slots)
        runner.allocate(caches.num_pages, scheduler.page_size, caches.num_slots)
        self.summary: dict[str, str] = {}
        """What was built, for `EngineReady`; filled by whoever built it."""
        self.max_model_len = caches.max_model_len
        self.vocab_size = contract.vocab_size
        self.cache_bytes = caches.bytes
        self._runner = runner
        self._scheduler = Scheduler(scheduler, contract, caches.num_pages, caches.max_model_len)
        self._inputs = StepInputs(contract, self._scheduler.tables)
        self._sampler = sampler or Sampler(contract.vocab_size, caches.num_slots)
        self._requests: dict[str, RequestState] = {}
        self._free_rows: list[int] = []
        self._arrivals = 0
        self._outputs: list[TokenOutput | RequestFailed] = []
        self._stats = EngineStats(pages_total=self._scheduler.tables.total)

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to compute or to report."""
        return bool(self._requests or self._outputs)

    def add(self, request: EngineRequest) -> None:
        """Queues a request.

        Raises:
            InvalidRequestError: it cannot be served as written (the subclass says why); nothing
                has changed.
        """
        self._check(request)
        row = self._free_rows.pop() if self._free_rows else len(self._requests)
        try:
            self._sampler.add(row, request)
        except InvalidRequestError:
            self._free_rows.append(row)
            raise
        lengths = self._runner.contract.lengths
        state = RequestState(request, self._arrivals, row, self.max_model_len, lengths)
        self._arrivals += 1
        self._requests[request.request_id] = state
        self._scheduler.add(state)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Ends requests; the next step reports each with finish_reason 'abort'.

        Ids that are not live (any more) are ignored: they may have finished meanwhile.
        """
        for request_id in request_ids:
            state = self._requests.get(request_id)
            if state is not None:
                self._stats.aborted += 1
                self._end(state)
                self._outputs.append(
                    TokenOutput(
                        request_id=request_id,
                        token_ids=[],
                        finish_reason="abort",
                        metrics=state.metrics,
                    )
                )

    @torch.inference_mode()
    def step(self) -> list[TokenOutput | RequestFailed]:
        """Runs the model once, if there is anything to run, and reports what came of it."""
        started = time.perf_counter()
        plan = self._scheduler.schedule()
        if len(plan):
            logits = self._forward(plan)
            self._scheduler.commit(plan)
            self._collect_prompt_logprobs(plan, logits)
            self._sample(plan, logits)
        self._record(plan, time.perf_counter() - started)
        outputs, self._outputs = self._outputs, []
        return outputs

    def stats(self) -> EngineStats:
        """Counters since start, and gauges of the last step; a copy."""
        return msgspec.structs.replace(self._stats)

    def close(self) -> None:
        """Drops every request without a word and lets go of the model and its caches."""
        for state in list(self._requests.values()):
            self._end(state)
        self._outputs.clear()
        del self._runner, self._scheduler, self._inputs, self._sampler

    def _check(self, request: EngineRequest) -> None:
        tokens = request.prompt_token_ids
        where = f"request '{request.request_id}'"
        if request.request_id in self._requests:
            raise InvalidRequestError(f"{where} is already running; give every request its own id")
        if not tokens:
            raise EmptyPromptError(f"{where}: the prompt has no tokens; give at least one")
        if len(tokens) >= self.max_model_len:
            raise PromptTooLongError(
                f"{where}: the prompt has {len(tokens)} tokens and sequences end at "
                f"{self.max_model_len}, prompt and output together; use at most "
                f"{self.max_model_len - 1}"
            )
        unknown = [t for t in (min(tokens), max(tokens)) if not 0 <= t < self.vocab_size]
        if unknown:
            raise UnknownTokenError(
                f"{where}: token id {unknown[0]} at position {tokens.index(unknown[0])} of the "
                f"prompt is outside the vocabulary; use 0 to {self.vocab_size - 1}"
            )

    def _forward(self, plan: StepPlan) -> Tensor:
        """Logits [N, vocab]."""
        if self._runner.needs_requests:
            logits = self._runner.forward_requests(plan)
        else:
            logits = self._runner.forward(self._inputs.build(plan))
        expected = (len(plan.logit_index), self.vocab_size)
        if tuple(logits.shape) != expected:
            raise EngineError(
                f"the model returned logits {list(logits.shape)} where {list(expected)} were "
                "needed; its program does not follow its contract"
            )
        return logits

    def _collect_prompt_logprobs(self, plan: StepPlan, logits: Tensor) -> None:
        for rows in plan.prompt_rows:
            state = plan.requests[rows.at]
            following = state.tokens[rows.position + 1 : rows.position + 1 + rows.count].tolist()
            count = state.request.params.prompt_logprobs
            assert state.prompt_logprobs is not None
            assert count is not None
            state.prompt_logprobs += self._sampler.prompt_logprobs(
                logits[plan.logits_at(rows)], following, count
            )

    def _sample(self, plan: StepPlan, logits: Tensor) -> None:
        states = plan.requests
        if not plan.samples.all():
            states = [states[at] for at in np.flatnonzero(plan.samples)]
        if not states:
            return
        if len(plan.sampled_at) < len(logits):
            logits = logits[torch.from_numpy(plan.sampled_at).to(logits.device)]
        result = self._sampler.sample(logits, plan.rows[plan.samples])
        now = time.time()
        for state, token_id, logprobs in zip(
            states, result.token_ids.tolist(), result.logprobs, strict=True
        ):
            if result.bad_rows and state.row in result.bad_rows:
                self._fail(state, result.reasons.get(state.row, "its logits are not numbers"))
            else:
                self._accept(state, token_id, logprobs, now)

    def _accept(
        self, state: RequestState, token_id: int, logprobs: list[TokenLogprob] | None, now: float
    ) -> None:
        """One more output token, which may be the last."""
        state.append(token_id)
        self._sampler.append(state.row, token_id)
        self._stats.generated_tokens += 1
        output = TokenOutput(request_id=state.request_id, token_ids=[token_id])
        if logprobs is not None:
            output.logprobs = [logprobs]
        if state.metrics.first_token_time is None:
            state.metrics.first_token_time = now
            output.prompt_logprobs = state.prompt_logprobs
            output.metrics = msgspec.structs.replace(state.metrics)
        output.finish_reason, output.stop_reason = state.finish_reason()
        if output.finish_reason is not None:
            self._stats.finished += 1
            self._end(state)
            output.metrics = state.metrics
        elif state.starts_again():
            self._scheduler.restart(state)
            self._runner.release(state.request_id)
        self._outputs.append(output)

    def _fail(self, state: RequestState, reason: str) -> None:
        self._end(state, forget=True)
        self._outputs.append(
            RequestFailed(
                request_id=state.request_id,
                error=EngineError.__name__,
                message=f"request '{state.request_id}' cannot go on after {state.known} tokens: "
                f"{reason}",
            )
        )

    def _end(self, state: RequestState, *, forget: bool = False) -> None:
        """Frees everything a request holds."""
        state.metrics.finished_time = time.time()
        self._scheduler.finish(state, forget=forget)
        self._sampler.remove(state.row)
        self._runner.release(state.request_id)
        self._free_rows.append(state.row)
        del self._requests[state.request_id]

    def _record(self, plan: StepPlan, seconds: float) -> None:
        stats, scheduler = self._stats, self._scheduler
        stats.step += len(plan) > 0
        stats.step_seconds = seconds
        stats.scheduled_tokens = plan.num_tokens
        stats.running = len(scheduler.running)
        stats.waiting = scheduler.num_waiting
        stats.pages_used = scheduler.tables.used
        stats.prefix_queries = scheduler.prefix_queries
        stats.prefix_hits = scheduler.prefix_hits
        stats.preemptions = scheduler.preemptions
