"""The check run after every transform: logits of the program equal those of the plain model.

Two ragged sequences run packed. Before caches exist that is one call; after, they are fed in
uneven pieces over several steps through shuffled pages and swapped slots, so that prefill,
chunked prefill, decode and mixed batches are all in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...errors import CaptureError, NotCausalError, VerificationError
from ..capture.module_probe import plain_model
from ..capture.positions import max_positions
from ..capture.rope_lengths import length_rotaries, lengths_forgotten
from ..program import Fact, Program
from ..recipe import Step
from .noise import MOST, rounding_noise
from .rows import row_error

LENGTHS = (11, 6)
_PAGE_SIZE = 4
_PART = 7
_FOLLOWED = 43
EXACT = (torch.float32, torch.float64)
"""Dtypes in which rounding never hides a mistake."""


@dataclass(frozen=True)
class Reference:
    """Token ids and the plain model's logits [length, vocab] for them, per sequence."""

    token_ids: tuple[torch.Tensor, ...]
    logits: tuple[torch.Tensor, ...]
    implementation: str | None = None
    """The attention implementation they are of; None: the model's own choice."""
    noise: float = 0.0
    """Low precision: how far the logits move, of their range, if every operation rounds anew."""

    def limit(self, dtype: torch.dtype) -> float:
        """Largest error of a program that counts as rounding."""
        return max(tolerance(dtype), min(MOST, 2 * self.noise))


def reference_logits(
    model: nn.Module, seed: int = 0, lengths: Sequence[int] = LENGTHS
) -> Reference:
    """Runs the unmodified model on each sequence alone, without a cache.

    Raises:
        NotCausalError: later tokens change the logits of earlier ones.
    """
    ids = _sample(model, seed, lengths)
    _settle(model, ids[0][:1])
    implementation = causal_implementation(model, _sample(model, seed, [_longest(model)])[0])
    with plain_model(model, implementation):
        logits = tuple(_alone(model, i) for i in ids)
        noise = 0.0
        if next(model.parameters()).dtype not in EXACT:
            with rounding_noise(model):
                noise = _error([_alone(model, i) for i in ids], logits, exact=False)
    return Reference(ids, logits, implementation, noise)


def _settle(model: nn.Module, ids: torch.Tensor) -> None:
    """Some models change on their first forward, such as by scaling weights for inference."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            _alone(model, ids)
    finally:
        for module in training:
            module.training = True


def causal_implementation(model: nn.Module, ids: torch.Tensor) -> str | None:
    """The attention implementation under which earlier tokens do not see later ones.

    None: the model's own choice. Eager, if that loses its causality: some models make a mask of
    their own out of one that transformers leaves out where a kernel knows it is causal.

    Raises:
        NotCausalError: there is none.
    """
    errors = []
    for implementation in (None, "eager"):
        with plain_model(model, implementation):
            whole, part = _alone(model, ids), _alone(model, _other_end(model, ids))[:_PART]
        errors.append(float((part - whole[:_PART]).abs().max() / whole.abs().max().clamp_min(1e-9)))
        if errors[-1] <= 10 * tolerance(next(model.parameters()).dtype):
            return implementation
    raise NotCausalError(
        f"{type(model).__name__} is not autoregressive: logits of the first {_PART} tokens change "
        f"by {errors[0]:.1e} of their range when {len(ids) - _PART} more follow"
    )


def _longest(model: nn.Module) -> int:
    """Long enough that blocks and buckets of tokens, if the model has any, come out otherwise."""
    return min(_FOLLOWED, max_positions(model) or _FOLLOWED)


def _sample(model: nn.Module, seed: int, lengths: Sequence[int]) -> tuple[torch.Tensor, ...]:
    device = next(model.parameters()).device
    vocab_size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    generator = torch.Generator().manual_seed(seed)
    # Each token once: equal tokens can make equal scores, and a top-k among equals is anyone's.
    return tuple(_distinct(vocab_size, length, generator).to(device) for length in lengths)


def _other_end(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The first tokens alone; where the length is known to matter, with others after them."""
    if not length_rotaries(model):
        return ids[:_PART]
    return torch.cat([ids[:_PART], ids[_PART:].flip(0)])


def _distinct(vocab_size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    low = min(8, vocab_size // 2)
    if vocab_size - low < count:
        return torch.randint(vocab_size, (count,), generator=generator)
    return torch.randperm(vocab_size - low, generator=generator)[:count] + low


def _alone(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    # Some rotary embeddings remember the longest sequence they have seen.
    with lengths_forgotten(length_rotaries(model)):
        logits: torch.Tensor = model(input_ids=ids[None], use_cache=False).logits[0].float()
    return logits


def tolerance(dtype: torch.dtype) -> float:
    """Largest difference of logits over their largest magnitude that counts as equal."""
    return 1e-4 if dtype in EXACT else 4e-2


def _error(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor], exact: bool) -> float:
    """Largest difference over the largest magnitude, over all positions, or the better part."""
    pairs = zip(found, expected, strict=True)
    errors = torch.cat(
        [(a.float() - b).abs().amax(-1) / b.abs().max().clamp_min(1e-9) for a, b in pairs]
    )
    return float(errors.max() if exact else errors.quantile(2 / 3))


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
        return _error(self.logits(program), self.reference.logits, exact)

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
