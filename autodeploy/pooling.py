"""How one vector is made of a prompt's hidden states; light, for the command line reads it."""

from __future__ import annotations

from typing import Literal, get_args

Pooling = Literal["last", "mean"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
"""The last token's state, or the mean over all tokens."""
