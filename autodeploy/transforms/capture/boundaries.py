"""Where sequences start in the packed tokens, for hooks that run while a model is traced.

The model's own signature has no place for it, so the capture wrapper holds it here and every
hook that mixes tokens reads it. A context variable: two threads never see each other's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_cu_q: ContextVar[torch.Tensor | None] = ContextVar("cu_q", default=None)


@contextmanager
def boundaries(cu_q: torch.Tensor) -> Iterator[None]:
    """Holds `cu_q` [B + 1] int32 while the model's forward runs."""
    token = _cu_q.set(cu_q)
    try:
        yield
    finally:
        _cu_q.reset(token)


def current_cu_q() -> torch.Tensor:
    """The boundaries of the forward that is running.

    Raises:
        RuntimeError: called outside `boundaries`.
    """
    cu_q = _cu_q.get()
    if cu_q is None:
        raise RuntimeError("a capture hook ran outside of boundaries(cu_q); this is a bug")
    return cu_q
