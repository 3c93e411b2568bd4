"""Serving in low precision: whether each token is a choice the plain model might have made.

The workload of `serving` runs on an engine with everything on that the device has: CUDA graphs,
overlapped steps, the prefix cache, chunked prompts, and so few pages that requests are preempted.
The plain model then runs once over each prompt and answer, in the low precision and, with the same
weights, in float32. How far these two lie apart, position by position, is the model's own noise.
Every token must be the best of one of them, or as near to it as that noise explains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .serving import NO_REPETITION, Request, answers, plain_logits

SLACK = 1.5
"""Rounding is noise: its largest error over a few thousand logits varies by this much."""
_CHOOSING = ("topk", "sort", "argsort")


@dataclass(frozen=True)
class ServedRounding:
    """How the answers compare, and what the engine had to do for them."""

    tokens: int
    beyond: int
    """Tokens, or log probabilities, farther from both plain models than noise ever is."""
    typical: bool
    """Whether the better two thirds are as near as the better two thirds of the noise."""
    chooses: bool
    """The model takes the best few of experts or tokens. Rounding may tip that choice, in ours at
    other positions than in the plain one: up to a third of the tokens may be beyond."""
    noise: float
    """Largest difference of log probabilities between the plain models."""
    gap: float
    """Farthest a chosen token is from the best, as a log probability."""
    logprob_error: float
    preemptions: int
    prefix_hits: int
    replays: int
    """Steps that were one launch of a CUDA graph."""
    without_graph: int

    @property
    def agrees(self) -> bool:
        return self.typical and self.beyond <= (self.tokens // 3 if self.chooses else 0)


def serve_rounded(
    plain: nn.Module, exact: nn.Module, runner: Any, implementation: str | None = None
) -> ServedRounding:
    """Serves the workload with `runner` and compares it with both plain models.

    plain: in the low precision; exact: in float32, of the same weights. implementation: of
    attention in both; None: their own choice.

    Raises:
        RuntimeError: the engine failed a request (one whose logits are not numbers, say), or does
            not come to an end.
    """
    # Every other request is free to repeat itself: the choice has kernels of its own then.
    requests, stats = answers(runner, penalties=(NO_REPETITION, 1.0), overlap=True)
    with _Choices() as choices:
        low = [plain_logits(plain, r, implementation) for r in requests]
    high = [plain_logits(exact, r, implementation) for r in requests]
    noise, gaps, errors = _distances(requests, low, high)
    beyond = (gaps > 2 * SLACK * noise.max()) | (errors > SLACK * noise.max())
    usual = float(noise.quantile(2 / 3))
    return ServedRounding(
        tokens=len(gaps),
        beyond=int(beyond.sum()),
        # Both of two tokens may be off by the noise.
        typical=float(gaps.quantile(2 / 3)) <= 2 * SLACK * usual
        and float(errors.quantile(2 / 3)) <= SLACK * usual,
        chooses=choices.seen,
        noise=float(noise.max()),
        gap=float(gaps.max()),
        logprob_error=float(errors.max()),
        preemptions=stats.preemptions,
        prefix_hits=stats.prefix_hits,
        replays=stats.graph_replays,
        without_graph=stats.step - stats.graph_replays,
    )


def _distances(
    requests: Sequence[Request], low: Sequence[torch.Tensor], high: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each token: the noise there, how far it is from the best, and its log probability's error.

    low, high: logits [count, vocab] of both plain models, per request. The last two are from
    whichever of these is nearer.
    """
    noise, gaps, errors = [], [], []
    for request, *both in zip(requests, low, high, strict=True):
        logprobs = [logits.log_softmax(-1) for logits in both]
        chosen = torch.tensor(request.tokens)[:, None]
        found = torch.tensor(request.logprobs)
        noise.append((logprobs[0] - logprobs[1]).abs().amax(-1))
        scores = [request.scores(logits) for logits in both]
        from_best = [s.amax(-1) - s.gather(-1, chosen)[:, 0] for s in scores]
        gaps.append(torch.minimum(*from_best))
        from_found = [(p.gather(-1, chosen)[:, 0] - found).abs() for p in logprobs]
        errors.append(torch.minimum(*from_found))
    return torch.cat(noise), torch.cat(gaps), torch.cat(errors)


class _Choices(TorchDispatchMode):
    """Whether anything inside takes the best few of many."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= func.overloadpacket.__name__ in _CHOOSING
        return func(*args, **(kwargs or {}))
