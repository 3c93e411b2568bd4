"""Counters for kernels that split a product: how many parts of a tile have arrived."""

from __future__ import annotations

import torch

MAX_TILES = 4096
"""Tiles that parts can be counted for."""


def arrivals_of(device: torch.device, waiting: bool = False) -> torch.Tensor:
    """Counters [MAX_TILES] int32, of which one set serves a whole stream.

    Every launch leaves them at zero. waiting: those of launches whose parts wait for each other,
    which leave them at multiples of a number of their own. Zeros asked for while a graph is
    captured are written when it is replayed, and only there.
    """
    key = (device, waiting)
    made = _counters.get(key)
    if made is None:
        made = torch.zeros(MAX_TILES, dtype=torch.int32, device=device)
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _counters[key] = made
    return made


_counters: dict[tuple[torch.device, bool], torch.Tensor] = {}
