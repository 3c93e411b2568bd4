"""The sampler: logits of a step's sequences in, one token each out.

A row belongs to a live request from `add` to `remove`; what it asks for lies in one numpy table,
so a step of greedy or temperature / top-k / top-p / min-p rows runs no Python per request. Rows
with logit rules (see logits.py) or logprobs pay for themselves only.

The chain is Hugging Face's: rules, temperature, top-k, top-p, min-p. The token is found by
inverting the cumulative distribution, in id order, at a number that depends on the request's
seed and the count of its output tokens only (random_stream.py): the same logits give the same
token in any batch, at any row, before and after preemption.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .constraints import Constraint, MaskTable
from .device_sampler import DeviceSampler
from .logits import LogitRules, apply_rules
from .logprobs import token_logprobs
from .messages import EngineRequest, TokenLogprob
from .random_stream import WORD, uniforms
from .sampling import BROKEN, SampleResult, Sampling
from .truncation import BLOCK, block_sums, truncate

if TYPE_CHECKING:
    from llguidance import LLMatcher

ROW = np.dtype(
    [
        ("live", np.bool_),
        ("ruled", np.bool_),
        ("logprobs", np.int64),
        ("temperature", np.float32),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("seed", np.uint64),
        ("index", np.int64),
    ]
)
COLDEST, HOTTEST = 1e-30, 1e30
"""Bounds of a temperature above 0, within which float32 logits stay finite."""

CHUNK_BYTES = 2**22
"""float32 weights handled at once on CPU; 64 rows of 128k, temperature 0.7, top-k 20, top-p 0.8,
one core: 16 ms with 4 MiB, 64 ms with all rows at once (memory touched for the first time)."""


class Sampler:
    """Samples for a changing set of rows.

    Args:
        vocab_size: columns of the logits.
        max_num_seqs: rows expected; the table grows when a higher one is added.
    """

    def __init__(self, vocab_size: int, max_num_seqs: int) -> None:
        self.vocab_size = vocab_size
        self._table = np.zeros(max_num_seqs, dtype=ROW)
        self._rules: dict[int, LogitRules] = {}
        self._masks: MaskTable | None = None
        self._devices: dict[torch.device, DeviceSampler] = {}
        self._last_rows = b""
        self._last_entries = self._table[:0]
        self._last_best = False

    def add(self, row: int, request: EngineRequest, matcher: LLMatcher | None = None) -> None:
        """Give `row` to a request that has no output yet.

        matcher: of its structured_outputs, its own, without a token.

        Raises:
            InvalidRequestError: its params name tokens outside the vocabulary; the row stays free.
            ValueError: the row is taken.
        """
        if row < len(self._table) and self._table["live"][row]:
            raise ValueError(f"row {row} has a live request; remove it first")
        rules = LogitRules(request, self.vocab_size)
        if matcher is not None:
            self._masks = self._masks or MaskTable(self.vocab_size)
            rules.constraint = self._masks.add(matcher)
        if row >= len(self._table):
            grown = np.zeros(max(row + 1, 2 * len(self._table)), dtype=ROW)
            grown[: len(self._table)] = self._table
            self._table = grown
        params = request.params
        temperature = params.temperature
        if not params.greedy:
            temperature = min(max(temperature, COLDEST), HOTTEST)
        self._table[row] = (
            True,
            rules.active,
            -1 if params.logprobs is None else params.logprobs,
            temperature,
            max(params.top_k, 0),
            params.top_p,
            params.min_p,
            request.seed & WORD,
            0,
        )
        self._last_rows = b""
        if rules.active:
            self._rules[row] = rules

    def remove(self, row: int) -> None:
        """Free `row`; unknown rows are a ValueError."""
        self._expect_live(row)
        self._table["live"][row] = False
        rules = self._rules.pop(row, None)
        if rules is not None and rules.constraint is not None:
            rules.constraint.table.remove(rules.constraint)
        self._last_rows = b""

    def append(self, row: int, token_id: int) -> None:
        """Tell that `token_id` became the next output token of `row`, sampled here or not."""
        self._expect_live(row)
        self.extend(np.array([row]), np.array([token_id]))

    def extend(self, rows: np.ndarray, token_ids: np.ndarray) -> None:
        """`append` for each of several live rows, at once."""
        self._table["index"][rows] += 1
        if not self._rules:
            return
        constrained: list[tuple[Constraint, int]] = []
        for row, token_id in zip(rows.tolist(), token_ids.tolist(), strict=True):
            rules = self._rules.get(row)
            if rules is None:
                continue
            rules.append(token_id)
            if rules.constraint is not None:
                constrained.append((rules.constraint, token_id))
            elif not rules.active:
                self._table["ruled"][row] = False
                self._last_rows = b""
                del self._rules[row]
        if self._masks is not None and constrained:
            self._masks.advance(constrained)

    def takes_best(self, rows: np.ndarray) -> bool:
        """Whether each of these live rows takes the most likely token and asks for nothing else."""
        self._entries_of(rows)
        return self._last_best

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[int] | np.ndarray) -> SampleResult:
        """The next token of each row; no row is advanced, that is `append`'s part.

        logits [N, V] of any float type and device, not changed; row i belongs to rows[i].
        A row of logits with NaN, +inf or nothing above -inf, or with every token forbidden, is
        reported as bad and does not affect others.

        Raises:
            ValueError: the shape is not [len(rows), vocab_size], or a row is not live.
        """
        index = np.asarray(rows, dtype=np.int64)
        if logits.device.type != "cpu":
            return self.launch(logits, index).result()
        table = self._entries(logits, index)
        rules = self._rules_of(table, index)
        processed = self._processed(logits, rules)
        token_ids = np.full(len(table), -1, dtype=np.int64)
        cold = table["temperature"] == 0.0
        for chosen, pick in ((cold, self._most_likely), (~cold, self._drawn)):
            at = np.flatnonzero(chosen)
            if len(at):
                token_ids[at] = pick(_take(processed, at), table[at])
        bad = np.flatnonzero(token_ids < 0)
        return SampleResult(
            token_ids=token_ids,
            logprobs=self._logprobs(logits, table, token_ids),
            bad_rows=index[bad].tolist(),
            reasons={int(index[at]): _reason(logits[at], rules.get(at)) for at in bad.tolist()},
        )

    @torch.inference_mode()
    def launch(self, logits: Tensor, rows: np.ndarray) -> Sampling:
        """As `sample`, but on an accelerator nothing waits: neither here nor there.

        The tokens that came before must have been told by `append`. The logits may be overwritten
        by work that is launched later on the same stream.
        """
        if logits.device.type == "cpu":
            result = self.sample(logits, rows)
            return Sampling(torch.from_numpy(result.token_ids), lambda: result)
        index = np.asarray(rows, dtype=np.int64)
        table = self._entries(logits, index)
        return self._on(logits.device).launch(logits, table, index, self._rules_of(table, index))

    def warm_up(self, logits: Tensor) -> None:
        """Compiles what `launch` runs for such logits [N, V], so that no request waits for it."""
        if logits.device.type != "cpu":
            self._on(logits.device).warm_up(logits)

    def _on(self, device: torch.device) -> DeviceSampler:
        if device not in self._devices:
            self._devices[device] = DeviceSampler(device, len(self._table))
        return self._devices[device]

    @torch.inference_mode()
    def distribution(self, logits: Tensor, rows: Sequence[int] | np.ndarray) -> Tensor:
        """What `sample` draws from: [N, V] float32 probabilities; greedy rows have a single 1.

        Rows that `sample` would call bad are NaN.
        """
        index = np.asarray(rows, dtype=np.int64)
        table = self._entries(logits, index)
        processed = self._processed(logits, self._rules_of(table, index))
        probabilities = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        for at in range(len(table)):
            row = processed[at : at + 1]
            if table["temperature"][at] == 0.0:
                best, token_id = row.max(-1)
                one = torch.nn.functional.one_hot(token_id, self.vocab_size).float()
                probabilities[at] = one[0] if best.isfinite().all() else torch.nan
            else:
                weights = _warped(row, table[at : at + 1])
                probabilities[at] = (weights / weights.sum())[0]
        return probabilities

    @torch.inference_mode()
    def prompt_logprobs(
        self, logits: Tensor, next_token_ids: Sequence[int], k: int
    ) -> list[list[TokenLogprob]]:
        """Per row of logits [M, V]: the token that did come next, then the k most likely."""
        return token_logprobs(logits, next_token_ids, [k] * len(next_token_ids))

    def _expect_live(self, row: int) -> None:
        if not 0 <= row < len(self._table) or not self._table["live"][row]:
            raise ValueError(f"row {row} has no live request; add one first")

    def _entries(self, logits: Tensor, rows: np.ndarray) -> np.ndarray:
        """The table's entries of `rows`, checked against the logits."""
        if tuple(logits.shape) != (len(rows), self.vocab_size):
            raise ValueError(
                f"logits are {list(logits.shape)}, expected [{len(rows)}, {self.vocab_size}]"
            )
        table = self._entries_of(rows)
        if (table["temperature"] > 0.0).any():
            # Not in place: a launched step may still want the entries that it was given.
            self._last_entries = table = table.copy()
            table["index"] = self._table["index"][rows]
        return table

    def _entries_of(self, rows: np.ndarray) -> np.ndarray:
        """The table's entries of `rows`; the count of their tokens may be an earlier one."""
        # The same requests are decoded for many steps; only that count changes.
        key = rows.tobytes()
        if key != self._last_rows:
            for row in rows[(rows < 0) | (rows >= len(self._table))].tolist():
                self._expect_live(row)
            table = self._table[rows]
            for row in rows[~table["live"]].tolist():
                self._expect_live(row)
            self._last_rows, self._last_entries = key, table
            asking = (table["temperature"] > 0.0) | table["ruled"] | (table["logprobs"] >= 0)
            self._last_best = not asking.any()
        return self._last_entries

    def _rules_of(self, table: np.ndarray, rows: np.ndarray) -> dict[int, LogitRules]:
        """By position."""
        ruled = np.flatnonzero(table["ruled"]).tolist()
        return {at: self._rules[int(rows[at])] for at in ruled}

    @staticmethod
    def _processed(logits: Tensor, rules: dict[int, LogitRules]) -> Tensor:
        """The logits themselves, or in float32 after the rules of the rows that have some."""
        if not rules:
            return logits
        processed = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        apply_rules(processed, rules)
        return processed

    @staticmethod
    def _most_likely(logits: Tensor, _table: np.ndarray) -> np.ndarray:
        """The first of the largest; -1 where that is not finite."""
        best, token_ids = logits.max(-1)
        return torch.where(best.isfinite(), token_ids, -1).cpu().numpy()

    @staticmethod
    def _drawn(logits: Tensor, table: np.ndarray) -> np.ndarray:
        numbers = uniforms(table["seed"], table["index"])
        rows = len(table)
        if logits.device.type == "cpu":
            rows = max(1, CHUNK_BYTES // (4 * logits.shape[1]))
        parts = [
            draw(_warped(logits[at : at + rows], table[at : at + rows]), numbers[at : at + rows])
            for at in range(0, len(table), rows)
        ]
        return torch.cat(parts).cpu().numpy()

    @staticmethod
    def _logprobs(
        logits: Tensor, table: np.ndarray, token_ids: np.ndarray
    ) -> list[list[TokenLogprob] | None]:
        result: list[list[TokenLogprob] | None] = [None] * len(table)
        asking = np.flatnonzero((table["logprobs"] >= 0) & (token_ids >= 0))
        if len(asking):
            counts = table["logprobs"][asking].tolist()
            entries = token_logprobs(_take(logits, asking), token_ids[asking].tolist(), counts)
            for at, entry in zip(asking, entries, strict=True):
                result[at] = entry
        return result


def draw(weights: Tensor, numbers: np.ndarray) -> Tensor:
    """Invert each row's cumulative distribution at a number of [0, 1).

    weights [S, V] float32, non-negative, not necessarily summing to 1; numbers [S] float64;
    gives [S] int64, -1 where the sum is not finite or not positive. Two levels (blocks, then
    one block) instead of V cumulative sums: a tenth of the time at V = 128k.
    """
    vocab = weights.shape[1]
    sums = block_sums(weights).cumsum(-1)
    total = sums[:, -1:]
    target = torch.from_numpy(numbers).to(weights.device)[:, None] * total
    block = _first_above(sums, target)
    before = torch.nn.functional.pad(sums, (1, 0)).gather(1, block)
    columns = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    inside = weights.gather(1, columns.clamp(max=vocab - 1)).double()
    inside = inside.masked_fill(columns >= vocab, 0.0).cumsum(-1)
    token_ids = block * BLOCK + _first_above(inside, target - before)
    return torch.where(total.isfinite() & (total > 0), token_ids, -1)[:, 0]


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """The first column whose cumulative sum is above the target [S, 1], as [S, 1] int64.

    Where rounding left the target at or above the last sum: the last column that added any.
    """
    place = (cumulative <= target).sum(-1, keepdim=True)
    return torch.minimum(place, cumulative.argmax(-1, keepdim=True))


def _warped(logits: Tensor, table: np.ndarray) -> Tensor:
    """Weights of the tokens that may be drawn, after temperature and truncation, [S, V]."""
    temperature, top_k, top_p, min_p = (
        table[name].copy() for name in ("temperature", "top_k", "top_p", "min_p")
    )
    logits = logits.float()
    if (temperature != 1.0).any():
        logits = logits / torch.from_numpy(temperature).to(logits.device)[:, None]
    weights = torch.softmax(logits, dim=-1)
    return truncate(weights, top_k, top_p, min_p)


def _take(values: Tensor, at: np.ndarray) -> Tensor:
    """Rows `at` of values; values itself where these are all."""
    if len(at) == len(values):
        return values
    return values[torch.from_numpy(at).to(values.device)]


def _reason(logits: Tensor, rules: LogitRules | None) -> str:
    if rules is not None and bool(logits.float().amax().isfinite()):
        return rules.why_none()
    return BROKEN
