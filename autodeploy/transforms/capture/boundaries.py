"""What hooks know of the packed tokens' sequences while a model is traced: starts and lengths.

The model's own signature has no place for it, so the capture wrapper holds it here and every
hook that mixes tokens reads it. A context variable: two threads never see each other's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_cu_q: ContextVar[torch.Tensor | None] = ContextVar("cu_q", default=None)
_known_len: ContextVar[torch.Tensor | None] = ContextVar("known_len", default=None)


@contextmanager
def boundaries(cu_q: torch.Tensor, known_len: torch.Tensor | None = None) -> Iterator[None]:
    """Holds `cu_q` [B + 1] int32 and `known_len` [1, T] int64 while the model's forward runs."""
    tokens = _cu_q.set(cu_q), _known_len.set(known_len)
    try:
        yield
    finally:
        _cu_q.reset(tokens[0])
        _known_len.reset(tokens[1])


def current_cu_q() -> torch.Tensor:
    """The boundaries of the forward that is running.

    Raises:
        RuntimeError: called outside `boundaries`.
    """
    cu_q = _cu_q.get()
    if cu_q is None:
        raise RuntimeError("a capture hook ran outside of boundaries(cu_q); this is a bug")
    return cu_q


def current_known_len() -> torch.Tensor:
    """The length each token of the forward that is running is computed for.

    Raises:
        RuntimeError: called outside `boundaries`, or without lengths.
    """
    known_len = _known_len.get()
    if known_len is None:
        raise RuntimeError("a capture hook asks for known_len, which was not given; this is a bug")
    return known_len
