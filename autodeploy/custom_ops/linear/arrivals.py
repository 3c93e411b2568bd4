"""Counters for kernels that split a product: whose part of a tile is the last to arrive."""

from __future__ import annotations

import torch

MAX_TILES = 4096
"""Tiles that parts can be counted for."""


def arrivals_of(device: torch.device) -> torch.Tensor:
    """Counters [MAX_TILES] int32 that every launch leaves at zero: one set serves a whole stream.

    Zeros asked for while a graph is captured are written when it is replayed, and only there.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        if device not in _counters:
            return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)
        return _counters[device]
    if device not in _counters:
        _counters[device] = torch.zeros(MAX_TILES, dtype=torch.int32, device=device)
    return _counters[device]


_counters: dict[torch.device, torch.Tensor] = {}
