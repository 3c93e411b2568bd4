"""Recurrences over packed sequences: how a state runs through the new tokens of a step.

A token mixer with a fixed-size state is one function, `step`: one new token and the state before
it give one output and the state after it. Everything else is bookkeeping, and lives here once:
where each sequence starts, where its state comes from and goes to, and two ways to drive it.
`token_by_token` is the meaning. `by_block` advances all sequences that have a single new token
together and the others in blocks of tokens, which costs a Python iteration per block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from ..op import Op

Tokens = tuple[Tensor, ...]
"""What a recurrence reads per token; every tensor has the tokens as its first dimension."""

Advance = Callable[[Tokens, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Recurrence:
    """One token mixer, its weights bound."""

    step: Advance
    """One token each of n sequences: tokens, states [n, ...] to outputs, states [n, ...].
    The states it is given may be overwritten."""
    block: Advance
    """Consecutive tokens of one sequence: tokens [l, ...], state to outputs [l, ...], state."""
    block_length: int
    """Most tokens `block` takes at once."""


class States(Protocol):
    """Where the state of each sequence of the step is read from and written to."""

    def read(self, sequences: Tensor) -> Tensor:
        """States [n, ...] of sequences, given by index, before the step: the caller's to change."""

    def write(self, sequences: Tensor, states: Tensor) -> None:
        """Keeps the states [n, ...] after the step."""


@dataclass(frozen=True)
class FreshStates:
    """Every sequence starts from zeros and its state is dropped: the functional form."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def read(self, sequences: Tensor) -> Tensor:
        return torch.zeros((len(sequences), *self.shape), dtype=self.dtype, device=self.device)

    def write(self, sequences: Tensor, states: Tensor) -> None:
        pass


@dataclass(frozen=True)
class CachedStates:
    """States are rows of a cache [slots, ...]; a sequence at position 0 starts from zeros."""

    cache: Tensor
    cu_q: Tensor
    kv_len: Tensor
    state_slot: Tensor

    def read(self, sequences: Tensor) -> Tensor:
        states = self.cache.index_select(0, self.state_slot[sequences])
        new_tokens = self.cu_q[sequences + 1] - self.cu_q[sequences]
        begins = self.kv_len[sequences] == new_tokens
        # Not a product with 0: the row of a slot that was never used may hold anything, NaN too.
        return states.masked_fill_(begins.view(-1, *[1] * (states.dim() - 1)), 0)

    def write(self, sequences: Tensor, states: Tensor) -> None:
        self.cache.index_copy_(0, self.state_slot[sequences], states.to(self.cache.dtype))


Drive = Callable[[Recurrence, Tokens, Tensor, States, Tensor], Tensor]


def token_by_token(
    recurrence: Recurrence, tokens: Tokens, out: Tensor, states: States, cu_q: Tensor
) -> Tensor:
    """Runs `step` for each token in order: the meaning of every op of this package.

    out [T, ...] is filled and returned; rows at and after cu_q[-1] are left as they are.
    """
    for index, (start, stop) in enumerate(pairwise(cu_q.tolist())):
        if start == stop:
            continue
        sequence = torch.tensor([index], device=cu_q.device)
        state = states.read(sequence)
        for position in range(start, stop):
            token = tuple(tensor[position : position + 1] for tensor in tokens)
            out[position : position + 1], state = recurrence.step(token, state)
        states.write(sequence, state)
    return out


def by_block(
    recurrence: Recurrence, tokens: Tokens, out: Tensor, states: States, cu_q: Tensor
) -> Tensor:
    """Equal to `token_by_token`; sequences with one new token share one vectorised step."""
    boundaries = cu_q.tolist()
    lengths = [stop - start for start, stop in pairwise(boundaries)]
    single = [index for index, length in enumerate(lengths) if length == 1]
    if single:
        sequences = torch.tensor(single, device=cu_q.device)
        if len(single) == len(out):
            result, after = recurrence.step(tokens, states.read(sequences))
            out.copy_(result)
        else:
            rows = cu_q[sequences].long()
            token = tuple(tensor.index_select(0, rows) for tensor in tokens)
            result, after = recurrence.step(token, states.read(sequences))
            out.index_copy_(0, rows, result.to(out.dtype))
        states.write(sequences, after)
    for index, length in enumerate(lengths):
        if length > 1:
            sequence = torch.tensor([index], device=cu_q.device)
            state = states.read(sequence)[0]
            stop = boundaries[index + 1]
            for start in range(boundaries[index], stop, recurrence.block_length):
                span = slice(start, min(start + recurrence.block_length, stop))
                block = tuple(tensor[span] for tensor in tokens)
                out[span], state = recurrence.block(block, state)
            states.write(sequence, state[None])
    return out


def implement_by_block(op: Op) -> None:
    """Registers the implementation "blocked" of an op whose reference takes a `drive`."""

    def blocked(*arguments: Any, **flags: Any) -> Any:
        return op.reference(*arguments, drive=by_block, **flags)

    blocked.__name__ = blocked.__qualname__ = f"{op.name}_by_block"
    blocked.__module__ = op.reference.__module__
    # On the CPU only: the boundaries are read on the host.
    op.implement("blocked", when=lambda choice: choice.device.type == "cpu")(blocked)
