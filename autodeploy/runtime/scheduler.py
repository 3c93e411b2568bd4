"""The scheduler: which requests run in the next step, and how many tokens of each.

Requests have one order, (priority, arrival), and a step is planned in that order over running
and waiting ones alike. A decoding request computes its newest token; tokens for all of those are
set aside first, what is left of the budget goes to chunks of prompts. When pages run out the
last request in the order gives up its own (preemption): it waits again, keeps its tokens, and
later computes those that the prefix cache has lost. Whoever comes after it has nothing planned
yet, so no plan is ever revised.

Nothing deadlocks: the first request in the order can take the pages of every other, and alone it
fits (`caches.plan_caches` limits sequences to that length). Nothing starves within a priority:
a request is overtaken only by those that arrived before it.
"""

from __future__ import annotations

import heapq
import logging
import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from autodeploy.custom_ops.contract import Contract
from autodeploy.errors import ConfigError

from .batch import StepPlan
from .pages import BlockTables, SlotPool
from .request import RequestState
from .steady import SteadyDecode, can_be_steady

logger = logging.getLogger(__name__)

PROMPT_LOGPROB_ROWS = 256
"""Rows of prompt logits per step: 131 MB of float32 at a vocabulary of 128k."""

_by_key = attrgetter("key")


@dataclass(frozen=True)
class SchedulerConfig:
    """How requests share the steps. Names and defaults are vLLM's where it has them.

    Raises:
        ConfigError: a value is below 1.
    """

    max_num_seqs: int = 256
    """Requests that run at once."""
    max_num_batched_tokens: int = 2048
    """Tokens computed in one step, over all requests."""
    max_prefill_chunk: int | None = None
    """Prompt tokens of one request in one step; None: what the budget leaves."""
    max_model_len: int | None = None
    """Tokens of one sequence, prompt and output; None: what the model states."""
    page_size: int = 16
    """Tokens per page of the caches."""
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_prefill_chunk",
            "max_model_len",
            "page_size",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} leaves nothing to run; use 1 or more")


class Scheduler:
    """Plans steps for the requests it is given; owns their slots and pages.

    Args:
        config: budgets.
        contract: what the program keeps between steps.
        num_pages: of each per-token cache group.
        max_model_len: tokens at which sequences end; one that long must fit the pages alone.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        contract: Contract,
        num_pages: Mapping[str, int],
        max_model_len: int,
    ) -> None:
        self.config = config
        self.tables = BlockTables(
            contract.token_groups,
            num_pages,
            config.page_size,
            config.max_num_seqs,
            max_model_len,
        )
        self.slots = SlotPool(config.max_num_seqs)
        self.reuses_prefixes = config.enable_prefix_caching and _can_reuse_prefixes(contract)
        self.running: list[RequestState] = []
        """In order; the last one is preempted first."""
        self.forget_counts()
        self._waiting: list[tuple[tuple[int, int], RequestState]] = []
        self._num_waiting = 0
        self._plan, self._next_plan = (StepPlan(config.max_num_seqs) for _ in range(2))
        self._steady = False
        self._side_by_side: SteadyDecode | None = None
        self._unpublished: deque[tuple[int, int]] = deque()
        """Of those kept together: which has filled which page."""
        self._chunk = min(
            config.max_prefill_chunk or config.max_num_batched_tokens, config.max_num_batched_tokens
        )
        self._most_prompt_rows = PROMPT_LOGPROB_ROWS
        if contract.hidden is not None:
            # No wider than anything else that a step computes of a token.
            self._most_prompt_rows = config.max_num_batched_tokens
        self._budget = self._decoding = self._prompt_rows = 0
        self._admitting = True

    def forget_counts(self) -> None:
        """Counters begin anew."""
        self.preemptions = self.prefix_queries = self.prefix_hits = 0

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def has_requests(self) -> bool:
        return bool(self.running) or self._num_waiting > 0

    def add(self, request: RequestState) -> None:
        """Queues a request whose prompt is shorter than max_model_len."""
        heapq.heappush(self._waiting, (request.key, request))
        self._num_waiting += 1
        self._steady = False

    def finish(self, request: RequestState, *, forget: bool = False) -> None:
        """Takes a request out, at any time, and frees what it holds.

        forget: its pages must not be shared either, because their content is bad.
        """
        if request.finished:
            return
        self.settle()
        request.finished = True
        self._steady = False
        if forget:
            self.tables.forget(request.hashes)
        if request.slot >= 0:
            del self.running[bisect_left(self.running, request.key, key=_by_key)]
            self._free(request)
        else:
            self._num_waiting -= 1

    def restart(self, request: RequestState) -> None:
        """All tokens of a running request are computed anew, from the next step on."""
        self.settle()
        del self.running[bisect_left(self.running, request.key, key=_by_key)]
        self._free(request)
        self.add(request)

    def schedule(self) -> StepPlan:
        """The next step, empty if there are no requests; it stays valid until the next but one.

        Call `advance` when it is launched, and `publish` when the tokens before it are known.
        """
        before, plan = self._plan, self._next_plan
        self._plan, self._next_plan = plan, before
        if self._steady and self._follow(before):
            return plan
        self.settle()
        plan.clear()
        preemptions = self.preemptions
        self._fill()
        plan.seal()
        # Nobody is admitted in a step that preempts: whoever waits is looked at in the next.
        self._steady = (
            plan.only_decodes
            and len(plan) == len(self.running) > 0
            and self.preemptions == preemptions
        )
        return plan

    def steady(self, plan: StepPlan) -> SteadyDecode | None:
        """What keeps the books of the plan's requests, if not they themselves."""
        steady = self._side_by_side
        return steady if steady is not None and steady.states is plan.requests else None

    def keep_together(self, plan: StepPlan) -> SteadyDecode | None:
        """Begins to keep the books of a launched plan's requests together, if that is possible.

        Only where steps overlap: `schedule` must not want tokens that the plan samples.
        """
        if self._steady and plan.follows and can_be_steady(plan.requests):
            self._side_by_side = SteadyDecode(plan.requests, plan.rows)
        return self.steady(plan)

    def settle(self) -> None:
        """Every request keeps its own books again."""
        if self._side_by_side is not None:
            self._publish_some(self._side_by_side, len(self._unpublished))
            self._side_by_side.settle()
            self._side_by_side = None

    def advance(self, plan: StepPlan) -> None:
        """The step is on its way: whatever runs after it finds its tokens in the caches."""
        steady = self.steady(plan)
        if steady is not None:
            steady.launch()
            return
        for request, end in zip(plan.requests, plan.ends.tolist(), strict=True):
            request.computed = end
            request.uses += 1

    def publish(self, plan: StepPlan) -> None:
        """The step is on its way and the tokens it computes are known: full pages can be shared."""
        if not self.reuses_prefixes:
            return
        page_size = self.config.page_size
        first_pages, end_pages = plan.starts // page_size, plan.ends // page_size
        full = np.flatnonzero(first_pages < end_pages).tolist()
        steady = self.steady(plan)
        if steady is None:
            for at in full:
                if plan.requests[at].slot == plan.slots[at]:
                    self._publish(plan.requests[at], int(first_pages[at]), int(end_pages[at]))
            return
        self._unpublished += [(at, int(first_pages[at])) for at in full]
        # Requests of one length fill their pages in the same step. That would be 1 ms for 256 of
        # them; nobody but a new request looks for these pages, and then all are published.
        self._publish_some(steady, len(plan) // page_size + 8)

    def _publish_some(self, steady: SteadyDecode, most: int) -> None:
        for _ in range(min(most, len(self._unpublished))):
            at, page = self._unpublished.popleft()
            steady.tell(at)
            self._publish(steady.states[at], page, page + 1)

    def _publish(self, request: RequestState, first: int, end: int) -> None:
        hashes = request.hash_pages(end * self.config.page_size, self.config.page_size)
        self.tables.publish(request.slot, hashes, first, end)

    def _follow(self, before: StepPlan) -> bool:
        """Plans one more token of every running request, if that is all there is to do.

        No Python per request, but for those that need a page.
        """
        plan, page_size = self._plan, self.config.page_size
        unresolved = self.steady(before) is not None or before.requests[0].unresolved
        if not plan.follow(before, unresolved):
            return False
        slid = False
        for window in self.tables.windows:
            leaves = (plan.starts >= window) & ((plan.starts - window + 1) % page_size == 0)
            for at in np.flatnonzero(leaves).tolist():
                self.tables.slide(int(plan.slots[at]), int(plan.starts[at]))
                slid = True
        if slid and self._num_waiting and self.slots.available:
            return False  # the pages that came back may be what somebody waits for
        begin_pages = plan.slots[plan.starts % page_size == 0].tolist()
        plan.new_pages = len(begin_pages)
        return self.tables.grow_by_one(begin_pages)

    def _fill(self) -> None:
        """Plans requests in order, running and waiting ones, as far as budget and pages go."""
        self._budget = self.config.max_num_batched_tokens
        self._prompt_rows = self._most_prompt_rows
        self._decoding = sum(request.decodes for request in self.running)
        self._admitting = True
        at = 0
        while True:
            running = self.running[at] if at < len(self.running) else None
            waiting = self._next_waiting() if self._admitting else None
            if waiting is not None and (running is None or waiting.key < running.key):
                self._admitting = self._admit(waiting)
            elif running is not None:
                self._place(running)
                at += 1
            else:
                return

    def _place(self, request: RequestState) -> None:
        """Plans tokens of a running request; it pauses if there is no budget or page for one."""
        start = request.computed
        self.tables.slide(request.slot, start)
        if request.decided:
            self._decoding -= request.decodes
            return
        if request.decodes:
            self._decoding -= 1
            count = min(1, self._budget)
        else:
            count = self._prefill_tokens(request, start)
        if count <= 0:
            return
        end = self.tables.room(request.slot, start + count)
        while end <= start:
            self._admitting = False
            if self.running[-1] is request:
                return
            self._preempt(self.running[-1])
            end = self.tables.room(request.slot, start + count)
        self.tables.grow(request.slot, end)
        self._budget -= end - start
        self._plan.add(request, start, end - start)

    def _prefill_tokens(self, request: RequestState, start: int) -> int:
        budget = self._budget - self._decoding
        if not len(self._plan):
            # The first in the order always advances: decoding ones behind it may lack pages.
            budget = max(1, budget)
        count = min(request.known - start, budget, self._chunk)
        missing = request.missing_prompt_logprobs
        if missing:
            before = request.next_prompt_row - start
            if missing > self._prompt_rows:
                count = min(count, before + self._prompt_rows)
            self._prompt_rows -= min(max(0, count - before), missing)
        return count

    def _admit(self, request: RequestState) -> bool:
        """Makes the first waiting request a running one; False if it must wait."""
        if not self.slots.available or self._budget <= self._decoding:
            return False
        cached, hashes = 0, request.hashes
        if self.reuses_prefixes:
            hashes = request.hash_pages(request.reusable, self.config.page_size)
            cached = self.tables.match(hashes, request.reusable)
        # One page for each running request, so that the new one is not preempted at once.
        while self.running and not self.tables.fits(
            hashes, cached, request.known, self._chunk, spare=len(self.running)
        ):
            if self.running[-1].key < request.key:
                return False
            self._preempt(self.running[-1])
        heapq.heappop(self._waiting)
        self._num_waiting -= 1
        request.slot = self.slots.take()
        request.computed = cached
        self.tables.attach(request.slot, hashes, cached)
        insort(self.running, request, key=_by_key)
        self._decoding += request.decodes
        if request.metrics.first_scheduled_time is None:
            request.metrics.first_scheduled_time = time.time()
            request.metrics.cached_tokens = cached
            self.prefix_queries += request.prompt_tokens if self.reuses_prefixes else 0
            self.prefix_hits += cached
        return self._admitting

    def _preempt(self, request: RequestState) -> None:
        self._admitting = False
        self._decoding -= request.decodes
        self.preemptions += 1
        request.metrics.preemptions += 1
        self.running.pop()
        self._free(request)
        self.add(request)

    def _free(self, request: RequestState) -> None:
        self.tables.clear(request.slot)
        self.slots.release(request.slot)
        request.slot = -1
        request.computed = 0

    def _next_waiting(self) -> RequestState | None:
        while self._waiting and self._waiting[0][1].finished:
            heapq.heappop(self._waiting)
        return self._waiting[0][1] if self._waiting else None


def _can_reuse_prefixes(contract: Contract) -> bool:
    if not contract.sequence_groups:
        return True
    logger.info(
        "prefix caching is off: the model keeps a recurrent state per sequence, whose value at "
        "the end of a shared prefix is not stored"
    )
    return False
