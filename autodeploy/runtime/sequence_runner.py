"""The slow rungs of the ladder: the model itself, one sequence at a time, exact and announced.

Rung 2 keeps the model's own cache per request; rung 3 keeps nothing and recomputes. Both serve
any model whose forward takes `input_ids`, whatever its graph looks like.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autodeploy.custom_ops.contract import Contract

from .batch import SequenceChunk, StepPlan

# The names under which transformers' models return and take their cache.
_CACHE_NAMES = ("past_key_values", "cache_params", "state")


class RecomputeRunner:
    """Rung 3: every step runs each sequence from its first token."""

    needs_requests = True

    def __init__(self, model: nn.Module, max_positions: int | None) -> None:
        self.contract = _contract(model, max_positions)
        self._model = model
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
            if self._must_run(chunk)
        ]
        if not rows:
            return torch.empty(0, self.contract.vocab_size, device=self.contract.device)
        return torch.cat(rows).float()

    def release(self, request_id: str) -> None:
        """Nothing is kept."""

    def _must_run(self, chunk: SequenceChunk) -> bool:
        """Tokens whose logits nobody needs leave no trace here."""
        return len(chunk.logit_rows) > 0

    def _logits(self, chunk: SequenceChunk) -> torch.Tensor:
        """Logits [count, vocab] of the chunk."""
        return self._run(chunk.token_ids, 0).logits[0, chunk.start :]

    def _run(self, token_ids: Any, start: int, **cache: Any) -> Any:
        ids = torch.as_tensor(token_ids, dtype=torch.int64, device=self.contract.device)[None]
        arguments: dict[str, Any] = {"input_ids": ids, "use_cache": False, **cache}
        if "position_ids" in self._accepted:
            arguments["position_ids"] = torch.arange(
                start, start + ids.shape[1], device=ids.device
            )[None]
        return self._model(**{k: v for k, v in arguments.items() if k in self._accepted})


class SequenceRunner(RecomputeRunner):
    """Rung 2: each sequence continues from the model's own cache."""

    def __init__(self, model: nn.Module, max_positions: int | None) -> None:
        super().__init__(model, max_positions)
        self._caches: dict[str, tuple[int, Any]] = {}
        self._cache_name = ""

    def release(self, request_id: str) -> None:
        """Drops the cache of a finished or preempted request."""
        self._caches.pop(request_id, None)

    def _must_run(self, chunk: SequenceChunk) -> bool:
        return True

    def _logits(self, chunk: SequenceChunk) -> torch.Tensor:
        done, cache = self._caches.pop(chunk.request_id, (0, None))
        if done != chunk.start:
            # Preempted, or its prefix was skipped: begin again.
            done, cache = 0, None
        given = {"use_cache": True} | ({self._cache_name: cache} if cache is not None else {})
        output = self._run(chunk.token_ids[done:], done, **given)
        self._cache_name = self._cache_name or _cache_name(output)
        end = chunk.start + chunk.count
        self._caches[chunk.request_id] = (end, getattr(output, self._cache_name))
        return output.logits[0, chunk.start - done :]


def _cache_name(output: Any) -> str:
    return next((n for n in _CACHE_NAMES if getattr(output, n, None) is not None), "")


@torch.no_grad()
def model_cache_error(model: nn.Module) -> float | None:
    """How much decoding with the model's own cache differs from one forward, over the range.

    None: the model returns no cache.
    """
    vocab = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    device = next(model.parameters()).device
    ids = torch.randint(vocab, (1, 9), generator=torch.Generator().manual_seed(1)).to(device)
    expected = model(input_ids=ids, use_cache=False).logits[0].float()
    first = model(input_ids=ids[:, :5], use_cache=True)
    if not _cache_name(first):
        return None
    runner = SequenceRunner(model, None)
    found = [first.logits[0].float()]
    name, cache = _cache_name(first), getattr(first, _cache_name(first))
    for i in range(5, ids.shape[1]):
        output = runner._run(ids[0, i : i + 1].tolist(), i, use_cache=True, **{name: cache})
        cache = getattr(output, name)
        found.append(output.logits[0].float())
    scale = expected.abs().max().clamp_min(1e-9)
    return float((torch.cat(found) - expected).abs().max() / scale)


def _contract(model: nn.Module, max_positions: int | None) -> Contract:
    weight = next(p for p in model.parameters() if p.is_floating_point())
    return Contract(
        metadata=(),
        groups=(),
        vocab_size=model.get_output_embeddings().weight.shape[0],  # type: ignore[operator]
        max_positions=max_positions,
        device=weight.device,
        dtype=weight.dtype,
    )
