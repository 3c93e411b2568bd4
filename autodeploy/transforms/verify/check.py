"""The check run after every transform: logits of the program equal those of the plain model.

Two ragged sequences run packed. Before caches exist that is one call; after, they are fed in
uneven pieces over several steps through shuffled pages and swapped slots, so that prefill,
chunked prefill, decode and mixed batches are all in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...errors import CaptureError, VerificationError
from ..program import Fact, Program
from ..recipe import Step

LENGTHS = (11, 6)
# How many tokens of each sequence run in each step once caches exist.
_SCHEDULE = ((4, 6), (5, 0), (1, 0), (1, 0))
_PAGE_SIZE = 4


@dataclass(frozen=True)
class Reference:
    """Token ids and the plain model's logits [length, vocab] for them, per sequence."""

    token_ids: tuple[torch.Tensor, ...]
    logits: tuple[torch.Tensor, ...]


def reference_logits(model: nn.Module, seed: int = 0) -> Reference:
    """Runs the unmodified model on each sequence alone, without a cache."""
    device = next(model.parameters()).device
    vocab_size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    generator = torch.Generator().manual_seed(seed)
    ids = tuple(
        torch.randint(vocab_size, (length,), generator=generator).to(device) for length in LENGTHS
    )
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            logits = tuple(model(input_ids=i[None], use_cache=False).logits[0].float() for i in ids)
    finally:
        model.train(training)
    return Reference(ids, logits)


def tolerance(dtype: torch.dtype) -> float:
    """Largest difference of logits over their largest magnitude that counts as equal."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 4e-2


@dataclass(frozen=True)
class SequenceCheck:
    """Compares a program with a reference; call it after every step."""

    reference: Reference

    def __call__(self, program: Program, step: Step) -> None:
        error = self.error(program)
        limit = tolerance(program.contract.dtype)
        if not error <= limit:
            raise VerificationError(
                f"after step '{step.id}' logits differ from the plain model's by {error:.2e} of "
                f"their range (limit {limit:.0e}); run with dump_graphs to see what it changed, "
                f"or drop the step: {{extends: default, drop: [{step.id}]}}"
            )

    def prove(self, program: Program) -> None:
        """Raises CaptureError unless the captured graph gives each packed sequence its logits."""
        error = self.error(program)
        if not error <= tolerance(program.contract.dtype):
            raise CaptureError(
                f"packed sequences differ from the model run on each alone by {error:.2e} of "
                "their range: something mixes tokens, or places them, outside of every hook"
            )

    @torch.no_grad()
    def error(self, program: Program) -> float:
        """Largest difference over the largest magnitude, over all positions."""
        run = _cached_logits if Fact.CACHED in program.facts else _packed_logits
        found = run(program, self.reference.token_ids)
        return max(
            float((a.float() - b).abs().max() / b.abs().max().clamp_min(1e-9))
            for a, b in zip(found, self.reference.logits, strict=True)
        )


def _packed_logits(program: Program, ids: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    inputs = _step_inputs(program, ids, [0] * len(ids), [len(i) for i in ids])
    return list(program.run(inputs).split([len(i) for i in ids]))


def _cached_logits(program: Program, ids: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    caches = _empty_caches(program, sum(_pages(len(i)) for i in ids) + 1, len(ids))
    rows: list[list[torch.Tensor]] = [[] for _ in ids]
    done = [0] * len(ids)
    for counts in _SCHEDULE:
        live = [s for s in range(len(ids)) if counts[s]]
        inputs = _step_inputs(program, ids, done, counts, live)
        logits = program.run({**inputs, **caches})
        for sequence, part in zip(live, logits.split([counts[s] for s in live]), strict=True):
            rows[sequence].append(part)
            done[sequence] += counts[sequence]
    return [torch.cat(parts) for parts in rows]


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
    for group in program.contract.token_groups:
        values[f"block_table_{group.name}"] = values["block_table"]
        values[f"slot_{group.name}"] = values["slot"]
    return {name: values[name].to(device) for name in program.inputs() if name in values}
