"""DeviceSampler: launches the choice of a step's tokens without ever waiting for the device.

A step of greedy rows is two kernels and one copy to pinned memory. Other rows add one copy of
their parameters and one kernel; rules and logprobs some more of each, for the rows that have any.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from torch import Tensor

from autodeploy.custom_ops.op import Choice
from autodeploy.custom_ops.sampling import argmax_rows, sample_rows

from .logits import LogitRules, apply_rules, mask_function
from .logprobs import logprob_table, read_logprobs
from .messages import TokenLogprob
from .random_stream import uniforms
from .sampling import BROKEN, SampleResult, Sampling
from .staging import RING, Staging, receive, send

PARAMETERS = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float64,
    "min_p": np.float32,
    "number": np.float64,
}
"""Columns that sample_rows takes, in its order."""

LOGPROB_BYTES = 2**26
"""float32 log probabilities handled at once: bounds what they take beside the logits."""


class DeviceSampler:
    """The part of `Sampler` that runs on an accelerator (or, as a check, anywhere).

    Args:
        max_num_seqs: rows expected; buffers grow when more are sampled.
    """

    def __init__(self, device: torch.device, max_num_seqs: int) -> None:
        self._device = device
        self._argmax = argmax_rows.choose(Choice(device, {})).function
        self._sample = sample_rows.choose(Choice(device, {})).function
        self._flights: deque[Sampling] = deque()
        self._launched = 0
        self._make_room(max_num_seqs)

    def _make_room(self, rows: int) -> None:
        self._rows = rows
        self._staging = Staging(
            {name: ((rows,), kind) for name, kind in PARAMETERS.items()}, self._device
        )
        cuda = self._device.type == "cuda"
        # Per launch: the tokens, and what the logits before any rule would have given.
        self._hosts = [
            torch.zeros((2, rows), dtype=torch.int64, pin_memory=cuda) for _ in range(RING)
        ]
        self._events = [torch.cuda.Event() if cuda else None for _ in range(RING)]

    @torch.inference_mode()
    def warm_up(self, logits: Tensor) -> None:
        """Runs every kernel on a row of logits [N, V], and of those that rules make of them."""
        columns = [
            torch.ones(1, dtype=torch.from_numpy(np.empty(0, kind)).dtype, device=self._device)
            for kind in PARAMETERS.values()
        ]
        for row in (logits[:1], logits[:1].float()):
            self._sample(row, *columns, self._argmax(row))
        words = torch.zeros((1, -(-logits.shape[1] // 32)), dtype=torch.int32, device=self._device)
        rows = torch.zeros(1, dtype=torch.int64, device=self._device)
        mask_function(self._device)(logits[:1].to(torch.float32, copy=True), words, rows)

    def launch(
        self,
        logits: Tensor,
        table: np.ndarray,
        rows: np.ndarray,
        rules: dict[int, LogitRules],
    ) -> Sampling:
        """Logits [N, V], not changed and not needed by later work on other streams.

        table [N] of sampler.ROW, not changed later; rows [N] int64 for the report; rules by
        position, applied as they are now.
        """
        count = len(table)
        # A buffer is used again only after its last copy: never a wait, unless a caller launches
        # more steps than an engine has under way.
        while self._flights and (len(self._flights) >= RING - 1 or count > self._rows):
            self._flights.popleft().result()
        if count > self._rows:
            self._make_room(2 * count)
        processed = logits
        if rules:
            processed = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            apply_rules(processed, rules)
        tokens = self._choose(processed, table)
        self._launched += 1
        slot = self._launched % RING
        host, event = self._hosts[slot], self._events[slot]
        host[0, :count].copy_(tokens, non_blocking=True)
        if rules:
            host[1, :count].copy_(self._argmax(logits), non_blocking=True)
        asking = np.flatnonzero(table["logprobs"] >= 0)
        logprobs = self._launch_logprobs(logits, tokens, table, asking) if len(asking) else None
        if event is not None:
            event.record()

        def collect() -> SampleResult:
            token_ids = host[0, :count].numpy().copy()
            found: list[list[TokenLogprob] | None] = [None] * count
            if logprobs is not None:
                counts = table["logprobs"][asking].tolist()
                entries = read_logprobs(logprobs.numpy(), token_ids[asking].tolist(), counts)
                for at, entry in zip(asking.tolist(), entries, strict=True):
                    found[at] = entry if token_ids[at] >= 0 else None
            bad = np.flatnonzero(token_ids < 0).tolist()
            reasons = {
                int(rows[at]): rules[at].why_none() if at in rules and host[1, at] >= 0 else BROKEN
                for at in bad
            }
            return SampleResult(token_ids, found, rows[bad].tolist(), reasons)

        sampling = Sampling(tokens, collect, None if event is None else event.synchronize)
        self._flights.append(sampling)
        return sampling

    def _choose(self, logits: Tensor, table: np.ndarray) -> Tensor:
        """[N] int64: the first of the largest, or a draw where the temperature is above 0."""
        warm = table["temperature"] > 0
        if not warm.any():
            return self._argmax(logits)
        count = len(table)
        if warm.all():
            tokens = torch.empty(count, dtype=torch.int64, device=logits.device)
        else:
            tokens = self._argmax(logits)
        arrays = self._staging.next()
        for name in ("temperature", "top_p", "min_p"):
            arrays[name][:count] = table[name]
        arrays["top_k"][:count] = np.minimum(table["top_k"], logits.shape[1])
        arrays["number"][:count] = uniforms(table["seed"], table["index"])
        self._staging.send()
        columns = [self._staging.tensors[name][:count] for name in PARAMETERS]
        self._sample(logits, *columns, tokens)
        return tokens

    def _launch_logprobs(
        self, logits: Tensor, tokens: Tensor, table: np.ndarray, asking: np.ndarray
    ) -> Tensor:
        """The table of `logprob_table` for the positions `asking`, on its way to the host."""
        tokens = tokens.clamp(min=0)
        if len(asking) < len(table):
            index = send(asking, self._device)
            logits, tokens = logits.index_select(0, index), tokens.index_select(0, index)
        width = min(int(table["logprobs"].max()), logits.shape[1])
        step = max(1, LOGPROB_BYTES // (4 * logits.shape[1]))
        parts = [
            logprob_table(logits[at : at + step], tokens[at : at + step], width)
            for at in range(0, len(asking), step)
        ]
        return receive(torch.cat(parts) if len(parts) > 1 else parts[0])
