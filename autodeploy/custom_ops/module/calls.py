"""The calls behind module nodes: a graph node can only name one, and finds it here.

Weak references: a call lives as long as the program that was captured with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from weakref import WeakValueDictionary

import torch

from ..op import OpError


class TokenCall(Protocol):
    """One call of one module of a model; every tensor has its tokens first."""

    name: str
    """Where it stands in the model, as a person reads it."""
    outputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    """Shape without tokens, and dtype, of each output."""
    token_caches: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    """The same of what is kept per token."""
    states: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    """Shape and dtype of what is kept per sequence."""

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One whole sequence, without a cache: inputs [T, ...] -> outputs [T, ...]."""

    def begin(
        self, inputs: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """The first tokens of a sequence: outputs, what to keep per token, and states."""

    def go_on(
        self,
        inputs: Sequence[torch.Tensor],
        past: Sequence[torch.Tensor],
        states: Sequence[torch.Tensor],
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """New tokens [T, ...] after P earlier ones, of which past [P, ...] was kept.

        Returns outputs [T, ...], what to keep of the new tokens, and the states after them.
        """


CALLS: WeakValueDictionary[str, TokenCall] = WeakValueDictionary()
"""By the key that nodes carry."""


def call_of(key: str) -> TokenCall:
    """The call of a node.

    Raises:
        OpError: the program it was captured for is gone.
    """
    call = CALLS.get(key)
    if call is None:
        raise OpError(f"module call '{key}' is gone with the model it was captured from")
    return call
