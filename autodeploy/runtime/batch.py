"""The step: which tokens of which requests are computed, and the tensors that say so.

`StepPlan` is what the scheduler decides; `StepInputs` turns it into the named tensors a compiled
program asks for. Both write into arrays that live as long as the engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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


class StepPlan:
    """One step: B requests, T tokens, N rows of logits; valid until the next is made.

    Args:
        max_num_seqs: largest B.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self.requests: list[RequestState] = []
        self.prompt_rows: list[PromptRows] = []
        self._slots = np.zeros(max_num_seqs, dtype=np.int64)
        self._rows = np.zeros(max_num_seqs, dtype=np.int64)
        self._starts = np.zeros(max_num_seqs, dtype=np.int64)
        self._counts = np.zeros(max_num_seqs, dtype=np.int64)
        self._samples = np.zeros(max_num_seqs, dtype=np.bool_)
        self._key_lengths = np.ones(max_num_seqs, dtype=np.int64)
        self._cu_q = np.zeros(max_num_seqs + 1, dtype=np.int64)
        self.logit_index = np.zeros(0, dtype=np.int64)
        """[N] ascending rows of T; at least one, even when no logits are needed."""
        self.sampled_at = np.zeros(0, dtype=np.int64)
        """[S] where in N the last token of each sampling request is."""

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def slots(self) -> np.ndarray:
        """[B] int64 slot of each request."""
        return self._slots[: len(self.requests)]

    @property
    def rows(self) -> np.ndarray:
        """[B] int64 sampler row of each request."""
        return self._rows[: len(self.requests)]

    @property
    def starts(self) -> np.ndarray:
        """[B] int64 position of each request's first token of this step."""
        return self._starts[: len(self.requests)]

    @property
    def counts(self) -> np.ndarray:
        """[B] int64 tokens of each request in this step, at least 1."""
        return self._counts[: len(self.requests)]

    @property
    def key_lengths(self) -> np.ndarray:
        """[B] int64 a length whose keys are those of each request's prompt; see LengthRule."""
        return self._key_lengths[: len(self.requests)]

    @property
    def samples(self) -> np.ndarray:
        """[B] bool: whether the chunk reaches the last known token, so the next is sampled."""
        return self._samples[: len(self.requests)]

    @property
    def cu_q(self) -> np.ndarray:
        """[B + 1] int64 where each request's tokens start in T."""
        return self._cu_q[: len(self.requests) + 1]

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self._cu_q[len(self.requests)])

    def clear(self) -> None:
        self.requests.clear()
        self.prompt_rows.clear()

    def add(self, request: RequestState, start: int, count: int) -> None:
        """Computes `count` tokens of a running request from position `start` on."""
        at = len(self.requests)
        self.requests.append(request)
        self._slots[at] = request.slot
        self._rows[at] = request.row
        self._starts[at] = start
        self._counts[at] = count
        self._key_lengths[at] = request.key_length
        self._samples[at] = start + count == request.known
        if request.missing_prompt_logprobs:
            first = request.next_prompt_row
            end = min(start + count, request.prompt_tokens - 1)
            if first < end:
                self.prompt_rows.append(PromptRows(at, first, end - first))

    def seal(self) -> StepPlan:
        """Works out cu_q and which rows need logits, once all requests are added."""
        size = len(self.requests)
        np.cumsum(self.counts, out=self._cu_q[1 : size + 1])
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
        return int(self._cu_q[rows.at] + rows.position - self._starts[rows.at])

    def sequences(self) -> Iterator[SequenceChunk]:
        """The step request by request; their logit rows side by side are `logit_index`."""
        bounds = np.searchsorted(self.logit_index, self.cu_q)
        for at, request in enumerate(self.requests):
            start, count = int(self._starts[at]), int(self._counts[at])
            rows = self.logit_index[bounds[at] : bounds[at + 1]] - self._cu_q[at]
            yield SequenceChunk(
                request.request_id, request.tokens, start, count, request.prefilled, rows
            )


class StepInputs:
    """Stages the step metadata of one program: exactly the names in `contract.metadata`.

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
        self._device = contract.device
        self._page_size = tables.page_size
        self._tables = {
            f"{name}_{group}": table for group, table in tables.tables.items() for name in PER_GROUP
        }
        self._buffers: dict[str, np.ndarray] = {}

    def build(self, plan: StepPlan) -> dict[str, Tensor]:
        """Shapes and dtypes as in METADATA; on the CPU they are views, valid for this step."""
        ends = plan.starts + plan.counts
        first = plan.starts - plan.cu_q[:-1]
        positions = np.arange(plan.num_tokens) + np.repeat(first, plan.counts)
        places = _Places(
            np.repeat(plan.slots, plan.counts),
            positions // self._page_size,
            positions % self._page_size,
            pages_needed(int(ends.max()), self._page_size),
        )
        values = {
            "position_ids": positions[None],
            "logit_index": plan.logit_index,
            "cu_q": plan.cu_q,
            "kv_len": ends,
            "state_slot": plan.slots,
        }
        if "known_len" in self._names:
            of_prompt = np.repeat(plan.key_lengths, plan.counts)
            values["known_len"] = np.maximum(of_prompt, positions + 1)[None]
        inputs = {}
        for name in self._names:
            if name == "input_ids":
                staged = self._staged(name, (1, plan.num_tokens), np.int64)
                _write_input_ids(plan, staged[0])
            elif name in values:
                dtype = np.int32 if name in INT32 else np.int64
                staged = self._staged(name, values[name].shape, dtype)
                staged[...] = values[name]
            elif name.startswith("block_table_"):
                staged = self._staged(name, (len(plan), places.width), np.int32)
                table = self._tables[name][:, : places.width]
                np.take(table, plan.slots, axis=0, out=staged, mode="clip")
            else:
                staged = self._staged(name, (plan.num_tokens,), np.int64)
                staged[:] = self._tables[name][places.slot, places.column]
                staged *= self._page_size
                staged += places.offset
            inputs[name] = torch.from_numpy(staged).to(self._device)
        return inputs

    def _staged(self, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """A contiguous array of this shape in the buffer of that name."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[name] = np.zeros(2 * size, dtype=dtype)
        return buffer[:size].reshape(shape)


@dataclass(frozen=True)
class _Places:
    """Where the step's T tokens lie in block tables, and how wide these are."""

    slot: np.ndarray
    column: np.ndarray
    offset: np.ndarray
    width: int


def _write_input_ids(plan: StepPlan, out: np.ndarray) -> None:
    begin = 0
    for request, start, count in zip(
        plan.requests, plan.starts.tolist(), plan.counts.tolist(), strict=True
    ):
        out[begin : begin + count] = request.tokens[start : start + count]
        begin += count
