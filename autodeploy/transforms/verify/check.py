"""The check run after every transform: logits of the program equal those of the plain model.

Two ragged sequences run packed. Before caches exist that is one call; after, they are fed in
uneven pieces over several steps through shuffled pages and swapped slots, so that prefill,
chunked prefill, decode and mixed batches are all in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...errors import CaptureError, VerificationError
from ..program import Fact, Program
from ..recipe import Step
from .reference import EXACT, Reference, largest_error
from .rows import row_error

_PAGE_SIZE = 4


@dataclass(frozen=True)
class SequenceCheck:
    """Compares a program with a reference; call it after every step."""

    reference: Reference

    def __call__(self, program: Program, step: Step) -> None:
        error = self.error(program)
        limit = self.reference.limit(program.contract.dtype)
        if not error <= limit:
            raise VerificationError(
                f"after step '{step.id}' logits differ from the plain model's by {error:.2e} of "
                f"their range (limit {limit:.0e}); run with dump_graphs to see what it changed, "
                f"or drop the step: {{extends: default, drop: [{step.id}]}}"
            )

    @torch.no_grad()
    def prove(self, program: Program) -> None:
        """Raises CaptureError unless the captured graph gives each packed sequence its logits.

        And unless it can be run in pieces, once the ops that mix tokens have caches.
        """
        try:
            error = self.error(program)
        except (RuntimeError, IndexError, ValueError) as failure:
            text = " ".join(str(failure).split())[:200]
            raise CaptureError(
                f"the exported graph fails for other lengths than it was made with: {text}"
            ) from failure
        if not error <= self.reference.limit(program.contract.dtype):
            raise CaptureError(
                f"packed sequences differ from the model run on each alone by {error:.2e} of "
                "their range: something mixes tokens, or places them, outside of every hook"
            )
        inputs = _packed_inputs(program, self.reference.token_ids)
        error = row_error(program, inputs)
        if not error <= self.reference.limit(program.contract.dtype):
            raise CaptureError(
                f"the last tokens of each sequence, run without the earlier ones, differ by "
                f"{error:.2e} of their range: something outside of attention depends on how many "
                "tokens there are, so it would be wrong with a cache"
            )

    def error(self, program: Program) -> float:
        """Largest difference over the largest magnitude, over all positions.

        In low precision, over the better two thirds of the positions: a top-k among experts or
        tokens may fall the other way by rounding alone, which a wrong mask or position, being
        wrong nearly everywhere, cannot hide behind.
        """
        exact = program.contract.dtype in EXACT
        return largest_error(self.logits(program), self.reference.logits, exact)

    @torch.no_grad()
    def logits(self, program: Program) -> list[torch.Tensor]:
        """The program's logits [length, vocab] of each sequence."""
        run = _cached_logits if Fact.CACHED in program.facts else _packed_logits
        return run(program, self.reference.token_ids)


def _packed_logits(program: Program, ids: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return list(program.run(_packed_inputs(program, ids)).split([len(i) for i in ids]))


def _packed_inputs(program: Program, ids: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return _step_inputs(program, ids, [0] * len(ids), [len(i) for i in ids])


def _cached_logits(program: Program, ids: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    caches = _empty_caches(program, sum(_pages(len(i)) for i in ids) + 1, len(ids))
    rows: list[list[torch.Tensor]] = [[] for _ in ids]
    done = [0] * len(ids)
    for counts in _schedule(*map(len, ids)):
        live = [s for s in range(len(ids)) if counts[s]]
        inputs = _step_inputs(program, ids, done, counts, live)
        logits = program.run({**inputs, **caches})
        for sequence, part in zip(live, logits.split([counts[s] for s in live]), strict=True):
            rows[sequence].append(part)
            done[sequence] += counts[sequence]
    return [torch.cat(parts) for parts in rows]


def _schedule(first: int, second: int) -> tuple[tuple[int, int], ...]:
    """How many tokens of each sequence run in each step; `first` is 7 or more."""
    return (4, second), (first - 6, 0), (1, 0), (1, 0)


def _pages(tokens: int) -> int:
    return -(-tokens // _PAGE_SIZE)


def _empty_caches(program: Program, pages: int, slots: int) -> dict[str, torch.Tensor]:
    """Caches full of NaN: a program must never read what it has not written."""
    caches = {}
    for group in program.contract.groups:
        leading = (pages, _PAGE_SIZE) if group.per == "token" else (slots,)
        for member in group.members:
            shape = (*leading, *member.spec.shape)
            caches[member.input] = torch.full(
                shape, float("nan"), dtype=member.spec.dtype, device=program.contract.device
            )
    return caches


def _step_inputs(
    program: Program,
    ids: Sequence[torch.Tensor],
    done: Sequence[int],
    counts: Sequence[int],
    live: Sequence[int] | None = None,
) -> dict[str, torch.Tensor]:
    live = range(len(ids)) if live is None else live
    device = program.contract.device
    positions = [torch.arange(done[s], done[s] + counts[s]) for s in live]
    # Pages of each sequence lie apart and in reverse, so that a wrong page shows.
    first_page = [1 + sum(_pages(len(i)) for i in ids[:s]) for s in range(len(ids))]
    tables = [
        torch.arange(first_page[s] + _pages(len(ids[s])) - 1, first_page[s] - 1, -1) for s in live
    ]
    width = max(len(table) for table in tables)
    slots = [
        tables[b][p // _PAGE_SIZE] * _PAGE_SIZE + p % _PAGE_SIZE for b, p in enumerate(positions)
    ]
    lengths = torch.tensor([counts[s] for s in live])
    values = {
        "input_ids": torch.cat([ids[s][done[s] : done[s] + counts[s]] for s in live])[None],
        "position_ids": torch.cat(positions)[None],
        "cu_q": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int(),
        "kv_len": torch.tensor([done[s] + counts[s] for s in live], dtype=torch.int32),
        "logit_index": torch.arange(int(lengths.sum())),
        "state_slot": torch.tensor([len(ids) - 1 - s for s in live]),
        "block_table": torch.stack(
            [torch.nn.functional.pad(t, (0, width - len(t))) for t in tables]
        ).int(),
        "slot": torch.cat(slots),
    }
    rule = program.contract.lengths
    if rule is not None:
        prompts = torch.tensor([rule.alike(len(ids[s])) for s in live]).repeat_interleave(lengths)
        values["known_len"] = torch.maximum(prompts, torch.cat(positions) + 1)[None]
    for group in program.contract.token_groups:
        values[f"block_table_{group.name}"] = values["block_table"]
        values[f"slot_{group.name}"] = values["slot"]
    return {name: values[name].to(device) for name in program.inputs() if name in values}
