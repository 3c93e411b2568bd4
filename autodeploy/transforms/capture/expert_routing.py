"""Which experts a token takes, and how much of each: given to a module, or made from scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

Lookup = Callable[[str], torch.Tensor]
"""An argument of the module, or what a part of it gives for the hidden states, by name."""


@dataclass(frozen=True)
class Given:
    """Two arguments: indices and weights, both [.., T, k]."""

    index: str
    weights: str
    source = ""
    """No part of the module takes part in routing."""

    def of(self, lookup: Lookup) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices and weights [T, k]."""
        return lookup(self.index).flatten(0, -2), lookup(self.weights).flatten(0, -2)


@dataclass(frozen=True)
class Scored:
    """The `chosen` largest of the scores [.., T, E] in `source`."""

    source: str
    chosen: int
    rule: str
    """One of `RULES`."""

    def of(self, lookup: Lookup) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices and weights [T, k]; weights are float32."""
        scores = lookup(self.source).flatten(0, -2).float()
        return RULES[self.rule](scores, self.chosen)


Routing = Given | Scored


def _softmax_of_chosen(scores: torch.Tensor, chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    # Also the softmax over all, divided by the sum of the chosen.
    top, index = scores.topk(chosen, dim=-1)
    return index, top.softmax(-1)


def _chosen_of_softmax(scores: torch.Tensor, chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    top, index = scores.softmax(-1).topk(chosen, dim=-1)
    return index, top


def _sigmoid(scores: torch.Tensor, chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    top, index = scores.topk(chosen, dim=-1)
    return index, top.sigmoid()


def _shares_of_sigmoid(scores: torch.Tensor, chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    index, top = _sigmoid(scores, chosen)
    return index, top / top.sum(-1, keepdim=True)


RULES: dict[str, Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]] = {
    "softmax of chosen": _softmax_of_chosen,
    "chosen of softmax": _chosen_of_softmax,
    "sigmoid": _sigmoid,
    "shares of sigmoid": _shares_of_sigmoid,
}


def routings(
    tensors: Mapping[str, torch.Tensor], hidden: str, total: int, numbers: Iterable[int]
) -> Iterator[Routing]:
    """Routings that the shapes allow.

    tensors: arguments, and what parts of the module give for the hidden states.
    numbers: any of them may be how many experts a token takes.
    """
    for name, index in tensors.items():
        if not index.is_floating_point() and index.dim() > 1:
            for other, weights in tensors.items():
                if weights.is_floating_point() and weights.shape == index.shape:
                    yield Given(name, other)
    for name, scores in tensors.items():
        if name != hidden and scores.is_floating_point() and scores.shape[-1] == total:
            for chosen in sorted({n for n in numbers if 0 < n <= total}):
                for rule in RULES:
                    yield Scored(name, chosen, rule)
