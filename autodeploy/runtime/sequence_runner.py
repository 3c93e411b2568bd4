"""The slow rungs of the ladder: the model itself, one sequence at a time, exact and announced.

Rung 2 keeps the model's own cache per request; rung 3 keeps nothing and recomputes. Both serve
any model whose forward takes `input_ids`, whatever its graph looks like.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autodeploy.custom_ops.contract import Contract, LengthRule

from .batch import SequenceChunk, StepPlan

_log = logging.getLogger("autodeploy")
Fresh = Callable[[], AbstractContextManager[Any]]
# The names under which transformers' models return and take their cache.
_CACHE_NAMES = ("past_key_values", "cache_params", "state")


class RecomputeRunner:
    """Rung 3: every step runs each sequence from its first token.

    fresh: opened around each call of the model, which then behaves as if it were the first.
    """

    needs_requests = True

    def __init__(
        self,
        model: nn.Module,
        max_positions: int | None,
        fresh: Fresh = nullcontext,
        lengths: LengthRule | None = None,
    ) -> None:
        self.contract = _contract(model, max_positions, lengths)
        self._model = model
        self._fresh = fresh
        self._accepted = frozenset(inspect.signature(model.forward).parameters)

    def allocate(self, num_pages: Mapping[str, int], page_size: int, num_slots: int) -> None:
        """Nothing to make: this runner has no paged caches."""

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        raise TypeError("this runner takes one sequence at a time: call forward_requests")

    @torch.inference_mode()
    def forward_requests(self, plan: StepPlan) -> torch.Tensor:
        """Logits [N, vocab] float32 of each sequence's needed rows, one after the other."""
        rows = [
            self._logits(chunk)[torch.from_numpy(chunk.logit_rows).to(self.contract.device)]
            for chunk in plan.sequences()
            # Part of a prompt that nobody needs logits of yet: it is run whole, later.
            if len(chunk.logit_rows)
        ]
        if not rows:
            return torch.empty(0, self.contract.vocab_size, device=self.contract.device)
        return torch.cat(rows).float()

    def release(self, request_id: str) -> None:
        """Nothing is kept."""

    def _logits(self, chunk: SequenceChunk) -> torch.Tensor:
        """Logits [count, vocab] of the chunk."""
        end = chunk.start + chunk.count
        output = self._run(chunk.known_ids[: max(end, chunk.prefilled)])
        return output.logits[0, chunk.start : end]

    def _run(self, token_ids: Any, **cache: Any) -> Any:
        # No position_ids: what the model makes of its cache and of nothing else is its meaning.
        ids = torch.as_tensor(token_ids, dtype=torch.int64, device=self.contract.device)[None]
        arguments: dict[str, Any] = {"input_ids": ids, "use_cache": False, **cache}
        with self._fresh():
            return self._model(**{k: v for k, v in arguments.items() if k in self._accepted})


@dataclass
class _Kept:
    """What rung 2 has of one request."""

    done: int
    """Leading tokens in the cache."""
    cache: Any
    first: int
    logits: torch.Tensor
    """[done - first, vocab] of the last ones, not asked for yet."""


class SequenceRunner(RecomputeRunner):
    """Rung 2: each sequence continues from the model's own cache.

    As in `generate`, a prompt is one call and every later token another: what a model does with
    a prompt in pieces may be something else.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept: dict[str, _Kept] = {}
        self._cache_name = ""

    def release(self, request_id: str) -> None:
        """Drops the cache of a request that is over or begins again."""
        self._kept.pop(request_id, None)

    def _logits(self, chunk: SequenceChunk) -> torch.Tensor:
        kept = self._kept.get(chunk.request_id)
        if kept is None or kept.first != chunk.start:
            kept = self._advance(_Kept(0, None, 0, torch.empty(0)), chunk, chunk.prefilled)
        end = chunk.start + chunk.count
        while kept.done < end:
            kept = self._advance(kept, chunk, 1)
        logits = kept.logits[chunk.start - kept.first : end - kept.first]
        # A copy: a view would keep the logits of the whole prompt.
        kept.first, kept.logits = end, kept.logits[end - kept.first :].clone()
        self._kept[chunk.request_id] = kept
        return logits

    def _advance(self, kept: _Kept, chunk: SequenceChunk, count: int) -> _Kept:
        given = {"use_cache": True}
        if kept.cache is not None:
            given[self._cache_name] = kept.cache
        end = kept.done + count
        output = self._run(chunk.known_ids[kept.done : end], **given)
        self._cache_name = self._cache_name or _cache_name(output)
        logits = output.logits[0]
        if len(kept.logits):
            logits = torch.cat([kept.logits, logits])
        return _Kept(end, getattr(output, self._cache_name), end - len(logits), logits)


def _cache_name(output: Any) -> str:
    return next((n for n in _CACHE_NAMES if getattr(output, n, None) is not None), "")


@torch.no_grad()
def model_cache_error(model: nn.Module, fresh: Fresh = nullcontext) -> float | None:
    """How much decoding with the model's own cache differs from one forward, over the range.

    None: the model returns no cache, or cannot go on from it.
    """
    vocab = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    device = next(model.parameters()).device
    ids = torch.randint(vocab, (1, 9), generator=torch.Generator().manual_seed(1)).to(device)
    runner = SequenceRunner(model, None, fresh)
    expected = runner._run(ids[0]).logits[0].float()
    try:
        found = _decoded(runner, ids)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        _log.warning("the model's own cache fails: %s: %s", type(error).__name__, error)
        return None
    if found is None:
        return None
    errors = (found - expected).abs().amax(-1) / expected.abs().max().clamp_min(1e-9)
    exact = runner.contract.dtype in (torch.float32, torch.float64)
    # In low precision a choice among experts may fall the other way at few positions.
    return float(errors.max() if exact else errors.quantile(2 / 3))


def _decoded(runner: SequenceRunner, ids: torch.Tensor) -> torch.Tensor | None:
    """Logits of five tokens at once and the others one by one; None if there is no cache."""
    output = runner._run(ids[0, :5], use_cache=True)
    name = _cache_name(output)
    if not name:
        return None
    found = [output.logits[0].float()]
    for i in range(5, ids.shape[1]):
        output = runner._run(ids[0, i : i + 1], use_cache=True, **{name: getattr(output, name)})
        found.append(output.logits[0].float())
    return torch.cat(found)


def _contract(model: nn.Module, max_positions: int | None, lengths: LengthRule | None) -> Contract:
    weight = next(p for p in model.parameters() if p.is_floating_point())
    return Contract(
        metadata=(),
        groups=(),
        vocab_size=model.get_output_embeddings().weight.shape[0],  # type: ignore[operator]
        max_positions=max_positions,
        device=weight.device,
        dtype=weight.dtype,
        lengths=lengths,
    )
