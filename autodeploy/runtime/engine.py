"""EngineCore: requests in, tokens out, one step at a time.

    plan = scheduler.schedule()          which tokens to compute
    logits = step.forward(plan)          one packed batch of them
    sampling = sampler.launch(logits)    one token per request that has all its tokens computed
    sampling.result()                    the tokens, on the host

On an accelerator the host never waits between the first three: while one step runs there, the
tokens of the one before are handed out here and the one after is planned (`overlap`). The host's
part of a step costs time only where it is longer than the device's. Which tokens end a request is
then seen one step late, and what that step computed for it is dropped.

It knows nothing of text, sockets or threads: an executor hosts it, a front feeds it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor

from autodeploy.custom_ops.compile_ahead import KernelsAhead
from autodeploy.errors import AutodeployError, EngineError, InvalidRequestError

from .batch import StepPlan
from .caches import plan_caches
from .device_step import DeviceStep
from .engine_config import EngineConfig, mixed_sizes_of, overlaps, within_graph
from .grammar_queue import GrammarQueue, GrammarSource
from .memory import ask_for_prompts, memory_for_caches
from .messages import (
    EngineReady,
    EngineRequest,
    EngineStats,
    RequestFailed,
    TokenBatch,
    TokenLogprob,
    TokenOutput,
)
from .pooler import Pooler
from .request import RequestState
from .request_check import check_request
from .runner import ModelRunner
from .sampler import Sampler
from .sampling import SampleResult, Sampling
from .scheduler import Scheduler
from .spans import WAIT, span
from .staging import send
from .step import make_step

if TYPE_CHECKING:
    from llguidance import LLMatcher


class TokenSampler(Protocol):
    """What the engine needs of a sampler; `sampler.Sampler` is the one."""

    def add(self, row: int, request: EngineRequest, matcher: LLMatcher | None = None) -> None: ...
    def remove(self, row: int) -> None: ...
    def extend(self, rows: np.ndarray, token_ids: np.ndarray) -> None: ...
    def takes_best(self, rows: np.ndarray) -> bool: ...
    def launch(self, logits: Tensor, rows: np.ndarray) -> Sampling: ...
    def prompt_logprobs(
        self, logits: Tensor, next_token_ids: Sequence[int], k: int
    ) -> list[list[TokenLogprob]]: ...


@dataclass
class _Flight:
    """A step that was launched and whose tokens are not known yet."""

    plan: StepPlan
    states: list[RequestState]
    """Those for which a token is sampled."""
    slots: np.ndarray
    logits: Tensor | None
    """Until the choice of tokens is launched."""
    sampling: Sampling | None = None


COMPILE_SECONDS = 0.05
"""Longest that a step without other work waits for a grammar; messages are read in between."""
EngineOutput = TokenOutput | TokenBatch | RequestFailed


class EngineCore:
    """Serves requests with one model.

    Args:
        runner: the model; its caches are allocated here.
        config: budgets.
        sampler: None makes the usual one.
        grammars: for requests with structured_outputs; called once, by another thread, at the
            first of them. None refuses them.

    Raises:
        ConfigError, OutOfMemoryError: see `caches.plan_caches`.
    """

    def __init__(
        self,
        runner: ModelRunner,
        config: EngineConfig,
        sampler: TokenSampler | None = None,
        grammars: GrammarSource | None = None,
    ) -> None:
        contract = runner.contract
        scheduler = within_graph(config.scheduler, contract)
        ahead = KernelsAhead(contract.device)
        memory = config.kv_cache_memory_bytes
        measured = memory is None and config.num_pages is None
        if measured:
            mixed = mixed_sizes_of(config, scheduler, contract)
            memory = memory_for_caches(
                runner, scheduler, config.gpu_memory_utilization, mixed, ahead
            )
        caches = plan_caches(contract, scheduler, memory, config.num_pages)
        scheduler = dataclasses.replace(scheduler, max_num_seqs=caches.num_slots)
        # One slot more: padded sequences of CUDA graphs write there.
        runner.allocate(caches.num_pages, scheduler.page_size, caches.num_slots + 1)
        self.summary: dict[str, str] = {}
        """What was built, for `EngineReady`; filled by whoever built it."""
        self.max_model_len = caches.max_model_len
        self.vocab_size = contract.vocab_size
        self.cost = contract.cost
        self.cache_bytes = caches.bytes
        self._runner = runner
        self._scheduler = Scheduler(scheduler, contract, caches.num_pages, caches.max_model_len)
        self._overlaps = overlaps(contract, runner, config)
        self._flight: _Flight | None = None
        self._pooler = None if contract.hidden is None else Pooler()
        self._sampler = self._pooler or sampler or Sampler(contract.vocab_size, caches.num_slots)
        if not measured:
            ask_for_prompts(runner, scheduler, ahead)
        ahead.ask(self._warm_up)
        self._step = make_step(runner, self._scheduler, config, caches.num_slots, ahead)
        self._warm_up()
        self._compiling = GrammarQueue(grammars)
        self._requests: dict[str, RequestState] = {}
        self._free_rows: list[int] = []
        self._num_rows = 0
        self._arrivals = 0
        self._outputs: list[EngineOutput] = []
        self._batch = TokenBatch()
        self._stats = EngineStats(pages_total=self._scheduler.tables.total)

    @property
    def task(self) -> str:
        """generate, or embed."""
        return "generate" if self._pooler is None else "embed"

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to compute or to report."""
        return bool(self._requests or self._outputs or self._flight or self._compiling)

    def ready(self) -> EngineReady:
        """What a front must know of this engine."""
        config, pools = self._scheduler.config, self._scheduler.tables.pools.values()
        blocks = max((pool.num_pages - 1 for pool in pools), default=0)
        return EngineReady(
            vocab_size=self.vocab_size, max_model_len=self.max_model_len, summary=self.summary,
            cost=self.cost, task=self.task, step_tokens=config.max_num_batched_tokens,
            block_size=config.page_size,
            prefix_blocks=blocks if self._scheduler.reuses_prefixes else 0,
        )  # fmt: skip

    def add(self, request: EngineRequest) -> None:
        """Queues a request.

        One whose structured_outputs turn out not to compile fails in a later step.

        Raises:
            InvalidRequestError: it cannot be served as written (the subclass says why); nothing
                has changed.
        """
        running = request.request_id in self._requests or request.request_id in self._compiling
        check_request(request, running, self.task, self.vocab_size, self.max_model_len)
        matcher = None
        if request.params.structured_outputs is not None:
            matcher = self._compiling.matcher(request)
            if matcher is None:
                self._compiling.put(request)
                return
        self._admit(request, matcher)

    def _admit(self, request: EngineRequest, matcher: LLMatcher | None) -> None:
        row = self._free_rows.pop() if self._free_rows else self._num_rows
        self._num_rows = max(self._num_rows, row + 1)
        try:
            self._sampler.add(row, request, matcher)
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
                self._end(state)
            elif not self._compiling.drop(request_id):
                continue
            self._stats.aborted += 1
            ended = TokenOutput(request_id=request_id, token_ids=[], finish_reason="abort")
            ended.metrics = None if state is None else state.metrics
            self._outputs.append(ended)

    @torch.inference_mode()
    def step(self) -> list[EngineOutput]:
        """Launches the next step, if there is one, and reports what is known by then."""
        started = time.perf_counter()
        if self._compiling:
            self._admit_compiled()
        with span("autodeploy: schedule"):
            plan = self._scheduler.schedule()
        with span("autodeploy: launch"):
            flight = self._launch(plan) if len(plan) else None
        if self._flight is not None:
            self._land(self._flight)
        self._flight = flight
        if flight is not None:
            # All tokens it computes are known by now. Before any of its requests ends: what they
            # leave behind can be shared. Whoever does runs later, on the same stream.
            self._scheduler.publish(plan)
            self._sample(flight)
            if not self._overlaps:
                self._land(flight)
                self._flight = None
        self._record(plan, time.perf_counter() - started)
        return self._take_outputs()

    def stats(self) -> EngineStats:
        """Counters since start, and gauges of the last step; a copy."""
        return msgspec.structs.replace(self._stats)

    def forget_counts(self) -> None:
        """Counters begin anew."""
        self._stats = EngineStats(pages_total=self._scheduler.tables.total)
        self._scheduler.forget_counts()
        if isinstance(self._step, DeviceStep):
            self._step.counts = type(self._step.counts)()

    def close(self) -> None:
        """Drops every request without a word and lets go of the model and its caches."""
        self._flight = None
        for state in list(self._requests.values()):
            self._end(state)
        self._outputs.clear()
        del self._runner, self._scheduler, self._step, self._sampler

    def _admit_compiled(self) -> None:
        """Queues those whose grammars are there; waits a moment if there is nothing else to do."""
        idle = not (self._requests or self._outputs or self._flight)
        for request, outcome in self._compiling.take(COMPILE_SECONDS if idle else 0.0):
            try:
                if isinstance(outcome, AutodeployError):
                    raise outcome
                self._admit(request, outcome)
            except AutodeployError as error:
                self._outputs.append(
                    RequestFailed(
                        request_id=request.request_id,
                        error=type(error).__name__,
                        message=str(error),
                    )
                )

    def _warm_up(self) -> None:
        """Runs the sampler's kernels: they are compiled now, not while the first request waits."""
        contract = self._runner.contract
        if contract.device.type == "cuda" and isinstance(self._sampler, Sampler):
            shape = (1, contract.vocab_size)
            self._sampler.warm_up(torch.zeros(shape, dtype=contract.dtype, device=contract.device))

    def _launch(self, plan: StepPlan) -> _Flight:
        """Runs the model's part of a step; on an accelerator, without waiting for it."""
        logits = self._step.forward(plan)
        expected = (len(plan.logit_index), self._runner.contract.width)
        if tuple(logits.shape) != expected:
            raise EngineError(
                f"the model returned logits {list(logits.shape)} where {list(expected)} were "
                "needed; its program does not follow its contract"
            )
        self._scheduler.advance(plan)
        if plan.prompt_rows:
            self._collect_prompt_rows(plan, logits)
        states, slots = plan.requests, plan.slots
        if not plan.samples.all():
            states = [states[at] for at in np.flatnonzero(plan.samples)]
            slots = slots[plan.samples]
        return _Flight(plan, states, slots, logits)

    def _collect_prompt_rows(self, plan: StepPlan, logits: Tensor) -> None:
        for rows in plan.prompt_rows:
            state = plan.requests[rows.at]
            if self._pooler is not None:
                assert state.prompt_logprobs is not None
                state.prompt_logprobs += [None] * rows.count
                self._pooler.take_in(state.row, logits[plan.logits_at(rows)])
                continue
            following = state.tokens[rows.position + 1 : rows.position + 1 + rows.count].tolist()
            count = state.request.params.prompt_logprobs
            assert state.prompt_logprobs is not None
            assert count is not None
            state.prompt_logprobs += self._sampler.prompt_logprobs(
                logits[plan.logits_at(rows)], following, count
            )

    def _sample(self, flight: _Flight) -> None:
        """Launches the choice of a step's tokens; all tokens before them are known by now."""
        logits, plan = flight.logits, flight.plan
        flight.logits = None
        if not flight.states:
            return
        assert logits is not None
        rows = plan.rows if plan.only_decodes else plan.rows[plan.samples]
        if self._sampler.takes_best(rows):
            flight.sampling = self._step.best(rows)
        if flight.sampling is None:
            if len(plan.sampled_at) < len(logits):
                logits = logits.index_select(0, send(plan.sampled_at, logits.device))
            flight.sampling = self._sampler.launch(logits, rows)
            assert flight.sampling.tokens is not None
            if self._overlaps:
                self._step.relay(flight.slots, flight.sampling.tokens)
        steady = self._scheduler.steady(plan)
        if steady is None and self._overlaps:
            steady = self._scheduler.keep_together(plan)
        if steady is not None:
            steady.expect()
            return
        for state in flight.states:
            if not state.finished:
                state.expect()

    def _land(self, flight: _Flight) -> None:
        """Waits for a step and hands out its tokens."""
        if flight.sampling is not None:
            started = time.perf_counter()
            with span(WAIT):
                flight.sampling.wait()
            self._stats.waited_seconds += time.perf_counter() - started
            result = flight.sampling.result()
            if self._hand_out_together(flight, result):
                return
            self._hand_out(flight.states, result)
        for state in flight.plan.requests:
            state.uses -= 1
            if state.finished and not state.uses:
                self._release_row(state)

    def _hand_out_together(self, flight: _Flight, result: SampleResult) -> bool:
        """Gives all requests their tokens, if there is nothing more to say of any of them."""
        steady, token_ids = self._scheduler.steady(flight.plan), result.token_ids
        if steady is None:
            return False
        if steady.may_end(token_ids):
            self._scheduler.settle()
            return False
        steady.land(token_ids)
        self._sampler.extend(steady.rows, token_ids)
        self._stats.generated_tokens += len(token_ids)
        self._outputs.append(TokenBatch(steady.request_ids, token_ids.tolist()))
        return True

    def _hand_out(self, states: list[RequestState], result: SampleResult) -> None:
        """Gives each request its token, one by one: where some begin or end, or ask for more."""
        now = time.time()
        rows, sampled = [], []
        request_ids, token_ids = self._batch.request_ids, self._batch.token_ids
        if result.vectors is not None:
            self._hand_out_vectors(states, result)
            return
        for state, token_id, logprobs in zip(
            states, result.token_ids.tolist(), result.logprobs, strict=True
        ):
            if state.finished:
                continue  # ended while this step ran
            if token_id < 0:
                reason = result.reasons.get(state.row, "its logits are not numbers")
                self._fail(state, reason)
                continue
            known = state.resolve(token_id)
            rows.append(state.row)
            sampled.append(token_id)
            if (
                state.plain
                and logprobs is None
                and known < state.limit
                and token_id not in state.stops
            ):
                request_ids.append(state.request_id)
                token_ids.append(token_id)
            else:
                self._report(state, token_id, logprobs, now)
        # Before the rows of those that ended are given to others: this step still uses them.
        self._sampler.extend(np.array(rows, dtype=np.int64), np.array(sampled, dtype=np.int64))
        self._stats.generated_tokens += len(rows)

    def _hand_out_vectors(self, states: list[RequestState], result: SampleResult) -> None:
        """Gives each request its vector, which ends it."""
        now = time.time()
        for state, token_id, vector in zip(
            states, result.token_ids.tolist(), result.vectors or [], strict=True
        ):
            if state.finished:
                continue
            if token_id < 0:
                self._fail(state, result.reasons[state.row])
                continue
            state.metrics.first_token_time = now
            self._stats.finished += 1
            self._end(state)
            self._outputs.append(
                TokenOutput(
                    request_id=state.request_id, token_ids=[], finish_reason="stop",
                    metrics=state.metrics, embedding=vector,
                )
            )  # fmt: skip

    def _report(
        self, state: RequestState, token_id: int, logprobs: list[TokenLogprob] | None, now: float
    ) -> None:
        """One more output token, of which there is more to say: the first, say, or the last."""
        output = TokenOutput(request_id=state.request_id, token_ids=[token_id])
        if logprobs is not None:
            output.logprobs = [logprobs]
        if state.metrics.first_token_time is None:
            state.metrics.first_token_time = now
            state.plain = state.lengths is None and state.request.params.logprobs is None
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

    def _take_outputs(self) -> list[EngineOutput]:
        outputs, self._outputs = self._outputs, []
        if self._batch.request_ids:
            outputs.append(self._batch)
            self._batch = TokenBatch()
        return outputs

    def _fail(self, state: RequestState, reason: str) -> None:
        self._end(state, forget=True)
        self._outputs.append(
            RequestFailed(
                request_id=state.request_id,
                error=EngineError.__name__,
                message=f"request '{state.request_id}' cannot go on after {state.known - 1} "
                f"tokens: {reason}",
            )
        )

    def _end(self, state: RequestState, *, forget: bool = False) -> None:
        """Frees everything a request holds."""
        state.metrics.finished_time = time.time()
        self._scheduler.finish(state, forget=forget)
        self._runner.release(state.request_id)
        del self._requests[state.request_id]
        if not state.uses:
            self._release_row(state)

    def _release_row(self, state: RequestState) -> None:
        """Once no step in flight samples for it any more."""
        if state.row >= 0:
            self._sampler.remove(state.row)
            self._free_rows.append(state.row)
            state.row = -1

    def _record(self, plan: StepPlan, seconds: float) -> None:
        stats, scheduler = self._stats, self._scheduler
        stats.step += len(plan) > 0
        stats.step_seconds = seconds
        stats.scheduled_tokens = plan.num_tokens
        stats.running = len(scheduler.running)
        stats.waiting = scheduler.num_waiting + len(self._compiling)
        stats.pages_used = scheduler.tables.used
        stats.prefix_queries = scheduler.prefix_queries
        stats.prefix_hits = scheduler.prefix_hits
        stats.preemptions = scheduler.preemptions
        if isinstance(self._step, DeviceStep):
            counts = self._step.counts
            stats.graph_replays, stats.graph_misses = counts.replayed, counts.missed
            stats.mixed_replays, stats.mixed_steps = counts.mixed_replayed, counts.mixed
