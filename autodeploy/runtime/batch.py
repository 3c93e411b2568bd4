"""The step: which tokens of which requests are computed, and the tensors that say so.

`StepPlan` is what the scheduler decides; `StepInputs` turns it into the named tensors a compiled
program asks for. Both write into arrays that live as long as the engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autodeploy.custom_ops.contract import METADATA, PER_GROUP, Contract
from autodeploy.errors import EngineError

from .pages import BlockTables, pages_needed
from .request import RequestState

INT32 = frozenset({"cu_q", "kv_len"})


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Positions of one request whose logits score the prompt's next token."""

    at: int
    """Index of the request in the plan."""
    position: int
    count: int


@dataclass(frozen=True, slots=True)
class SequenceChunk:
    """What one request computes in a step, for runners that take one sequence at a time."""

    request_id: str
    known_ids: np.ndarray
    """[known] int64: every known token, those after the chunk included."""
    start: int
    count: int
    prefilled: int
    """Leading tokens that are one prompt: what they give depends on how many they are."""
    logit_rows: np.ndarray
    """Rows of the chunk, 0 .. count - 1 ascending, whose logits are needed; may be empty."""

    @property
    def token_ids(self) -> np.ndarray:
        """[start + count] int64: every token up to the end of the chunk."""
        return self.known_ids[: self.start + self.count]


class FixedColumns:
    """What of a step's requests is the same in the steps that follow it; see `StepPlan`."""

    def __init__(self, max_num_seqs: int) -> None:
        self.slots = np.zeros(max_num_seqs, dtype=np.int64)
        self.rows = np.zeros(max_num_seqs, dtype=np.int64)
        self.counts = np.zeros(max_num_seqs, dtype=np.int64)
        self.samples = np.zeros(max_num_seqs, dtype=np.bool_)
        self.key_lengths = np.ones(max_num_seqs, dtype=np.int64)
        self.limits = np.zeros(max_num_seqs, dtype=np.int64)
        self.cu_q = np.zeros(max_num_seqs + 1, dtype=np.int64)


class StepPlan:
    """One step: B requests, T tokens, N rows of logits; valid until the next but one is made.

    Args:
        max_num_seqs: largest B.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self.requests: list[RequestState] = []
        self.prompt_rows: list[PromptRows] = []
        self._starts = np.zeros(max_num_seqs, dtype=np.int64)
        self.fixed = FixedColumns(max_num_seqs)
        """The same object in steps that follow each other."""
        self.unresolved = False
        """Whether it computes tokens that only the device knows yet."""
        self.only_decodes = False
        """Whether each request computes its newest token, and nothing else is asked for."""
        self.follows = False
        """Whether it computes the tokens that the step before sampled, request by request."""
        self.logit_index = np.zeros(0, dtype=np.int64)
        """[N] ascending rows of T; at least one, even when no logits are needed."""
        self.sampled_at = np.zeros(0, dtype=np.int64)
        """[S] where in N the last token of each sampling request is."""
        self.new_pages = -1
        """Requests whose token is the first of a page; -1: not counted."""

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def slots(self) -> np.ndarray:
        """[B] int64 slot of each request."""
        return self.fixed.slots[: len(self.requests)]

    @property
    def rows(self) -> np.ndarray:
        """[B] int64 sampler row of each request."""
        return self.fixed.rows[: len(self.requests)]

    @property
    def starts(self) -> np.ndarray:
        """[B] int64 position of each request's first token of this step."""
        return self._starts[: len(self.requests)]

    @property
    def counts(self) -> np.ndarray:
        """[B] int64 tokens of each request in this step, at least 1."""
        return self.fixed.counts[: len(self.requests)]

    @property
    def key_lengths(self) -> np.ndarray:
        """[B] int64 a length whose keys are those of each request's prompt; see LengthRule."""
        return self.fixed.key_lengths[: len(self.requests)]

    @property
    def samples(self) -> np.ndarray:
        """[B] bool: whether the chunk reaches the last known token, so the next is sampled."""
        return self.fixed.samples[: len(self.requests)]

    @property
    def cu_q(self) -> np.ndarray:
        """[B + 1] int64 where each request's tokens start in T."""
        return self.fixed.cu_q[: len(self.requests) + 1]

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.fixed.cu_q[len(self.requests)])

    @property
    def ends(self) -> np.ndarray:
        """[B] int64 known tokens of each request after this step."""
        return self.starts + self.counts

    def clear(self) -> None:
        self.requests = []
        self.prompt_rows = []
        self.unresolved = self.follows = False
        self.new_pages = -1
        # Not the old one: a step that is under way may read it, and others know it by its identity.
        self.fixed = FixedColumns(len(self._starts))

    def follow(self, before: StepPlan, unresolved: bool) -> bool:
        """Becomes the step after `before`, if that only decodes: one token more of each request.

        unresolved: whether only the device knows yet what `before` sampled. False if a request has
        no token left to compute. Costs nothing per request.
        """
        size = len(before)
        starts = self._starts[:size]
        np.add(before.starts, 1, out=starts)
        if (before.fixed.limits[:size] <= starts + 1).any():
            return False
        self.requests, self.prompt_rows = before.requests, []
        self.fixed = before.fixed
        self.logit_index, self.sampled_at = before.logit_index, before.sampled_at
        self.unresolved = unresolved
        self.only_decodes = self.follows = True
        return True

    def add(self, request: RequestState, start: int, count: int) -> None:
        """Computes `count` tokens of a running request from position `start` on."""
        at = len(self.requests)
        self.requests.append(request)
        self.fixed.slots[at] = request.slot
        self.fixed.rows[at] = request.row
        self._starts[at] = start
        self.fixed.counts[at] = count
        self.fixed.key_lengths[at] = request.key_length
        self.fixed.limits[at] = request.limit
        self.fixed.samples[at] = start + count == request.known
        self.unresolved |= request.unresolved
        if request.missing_prompt_logprobs:
            first = request.next_prompt_row
            end = min(start + count, request.prompt_tokens - 1)
            if first < end:
                self.prompt_rows.append(PromptRows(at, first, end - first))

    def seal(self) -> StepPlan:
        """Works out cu_q and which rows need logits, once all requests are added."""
        size = len(self.requests)
        self.only_decodes = not self.prompt_rows and bool(
            self.samples.all() and (self.counts == 1).all()
        )
        np.cumsum(self.counts, out=self.fixed.cu_q[1 : size + 1])
        needed = np.zeros(self.num_tokens, dtype=np.bool_)
        last = self.cu_q[1:][self.samples] - 1
        needed[last] = True
        for rows in self.prompt_rows:
            first = self._first_row(rows)
            needed[first : first + rows.count] = True
        if size and not needed.any():
            # Programs are compiled for one row or more.
            needed[-1] = True
        self.logit_index = np.flatnonzero(needed)
        self.sampled_at = np.searchsorted(self.logit_index, last)
        return self

    def logits_at(self, rows: PromptRows) -> slice:
        """Where in N the logits of these prompt rows are."""
        begin = int(np.searchsorted(self.logit_index, self._first_row(rows)))
        return slice(begin, begin + rows.count)

    def _first_row(self, rows: PromptRows) -> int:
        return int(self.fixed.cu_q[rows.at] + rows.position - self._starts[rows.at])

    def sequences(self) -> Iterator[SequenceChunk]:
        """The step request by request; their logit rows side by side are `logit_index`."""
        bounds = np.searchsorted(self.logit_index, self.cu_q)
        for at, request in enumerate(self.requests):
            start, count = int(self._starts[at]), int(self.fixed.counts[at])
            rows = self.logit_index[bounds[at] : bounds[at + 1]] - self.fixed.cu_q[at]
            yield SequenceChunk(
                request.request_id, request.tokens, start, count, request.prefilled, rows
            )


class StepInputs:
    """Works out the step metadata of one program: exactly the names in `contract.metadata`.

    Raises:
        EngineError: the program asks for something the runtime does not know.
    """

    def __init__(self, contract: Contract, tables: BlockTables) -> None:
        known = METADATA.keys() - PER_GROUP
        known |= {f"{name}_{group}" for name in PER_GROUP for group in tables.tables}
        for name in contract.metadata:
            if name not in known:
                raise EngineError(
                    f"the program asks for step input '{name}', which the runtime cannot stage; "
                    f"it knows {', '.join(sorted(known))}"
                )
        self._names = contract.metadata
        self.page_size = tables.page_size
        self._tables = {
            f"{name}_{group}": table for group, table in tables.tables.items() for name in PER_GROUP
        }
        self._buffers: dict[str, np.ndarray] = {}

    def shapes(
        self, tokens: int, sequences: int, rows: int
    ) -> dict[str, tuple[tuple[int, ...], type]]:
        """Shape and numpy dtype of every input but the block tables, for steps of a size."""
        sizes = {
            "input_ids": (1, tokens), "position_ids": (1, tokens), "known_len": (1, tokens),
            "logit_index": (rows,), "cu_q": (sequences + 1,), "kv_len": (sequences,),
            "state_slot": (sequences,),
        }  # fmt: skip
        return {
            name: (sizes.get(name, (tokens,)), np.int32 if name in INT32 else np.int64)
            for name in self._names
            if not name.startswith("block_table_")
        }

    def write(self, plan: StepPlan, arrays: Mapping[str, np.ndarray]) -> None:
        """Fills the leading entries of arrays that are as in `shapes`, or larger."""
        sequences, tokens = len(plan), plan.num_tokens
        if plan.only_decodes:
            # The hot path: nothing needs to be repeated or counted out.
            positions, slots = plan.starts, plan.slots
        else:
            first = plan.starts - plan.cu_q[:-1]
            positions = np.arange(tokens) + np.repeat(first, plan.counts)
            slots = np.repeat(plan.slots, plan.counts)
        for name, array in arrays.items():
            if name == "input_ids":
                write_input_ids(plan, array[0])
            elif name == "position_ids":
                array[0, :tokens] = positions
            elif name == "known_len":
                of_prompt = np.repeat(plan.key_lengths, plan.counts)
                array[0, :tokens] = np.maximum(of_prompt, positions + 1)
            elif name == "logit_index":
                array[: len(plan.logit_index)] = plan.logit_index
            elif name == "cu_q":
                array[: sequences + 1] = plan.cu_q
            elif name == "kv_len":
                array[:sequences] = plan.ends
            elif name == "state_slot":
                array[:sequences] = plan.slots
            else:
                array[:tokens] = self._tables[name][slots, positions // self.page_size]
                array[:tokens] *= self.page_size
                array[:tokens] += positions % self.page_size

    def table_width(self, plan: StepPlan) -> int:
        """Columns of the block tables that the step can read."""
        return pages_needed(int(plan.ends.max()), self.page_size)

    def build(self, plan: StepPlan) -> dict[str, Tensor]:
        """Every input as in METADATA, on the CPU: views, valid until the next call."""
        wanted = self.shapes(plan.num_tokens, len(plan), len(plan.logit_index))
        arrays = {name: self._buffer(name, *of_name) for name, of_name in wanted.items()}
        self.write(plan, arrays)
        width = self.table_width(plan)
        for name in self._names:
            if name.startswith("block_table_"):
                arrays[name] = self._buffer(name, (len(plan), width), np.int32)
                table = self._tables[name][:, :width]
                np.take(table, plan.slots, axis=0, out=arrays[name], mode="clip")
        return {name: torch.from_numpy(arrays[name]) for name in self._names}

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """A contiguous array of this shape in the buffer of that name."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[name] = np.zeros(2 * size, dtype=dtype)
        return buffer[:size].reshape(shape)


def write_input_ids(plan: StepPlan, out: np.ndarray) -> None:
    """Fills the leading T of out with a step's tokens; -1 - slot if only the device knows one."""
    if plan.follows and plan.unresolved:
        np.subtract(-1, plan.slots, out=out[: len(plan)])
        return
    if plan.only_decodes:
        out[: len(plan)] = [
            -1 - request.slot if request.unresolved else request.newest for request in plan.requests
        ]
        return
    begin = 0
    for request, start, count in zip(
        plan.requests, plan.starts.tolist(), plan.counts.tolist(), strict=True
    ):
        out[begin : begin + count] = request.tokens[start : start + count]
        begin += count
        if request.unresolved and start + count == request.known:
            # What stands for a token that only the device knows; see relay.TokenRelay.
            out[begin - 1] = -1 - request.slot
