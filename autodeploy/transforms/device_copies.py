"""Copies from a checkpoint's file to a device, without a second copy in host memory.

A checkpoint's file is mapped: until a tensor is read, nothing of it is in memory, and what has
been read the system may drop again. Each tensor is copied from the map straight to the device,
several at a time, because one thread cannot feed the bus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import nn

THREADS = 8
Item = TypeVar("Item")


def move_to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Moves every parameter and buffer of a model nobody else holds; what was tied stays tied."""
    holders: dict[tuple[object, ...], list[torch.Tensor]] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device != device:
            holders.setdefault(_view(tensor), []).append(tensor)

    def move(same: list[torch.Tensor]) -> None:
        moved = same[0].detach().to(device)
        for tensor in same:
            tensor.data = moved

    copy_each(move, holders.values(), device)
    # For the few that a class moves itself, in `_apply`.
    return model.to(device)


def copy_each(work: Callable[[Item], None], items: Iterable[Item], device: torch.device) -> None:
    """Calls `work` for every item: side by side if they are copies to another device."""
    if device.type == "cpu":
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        for future in [pool.submit(work, item) for item in items]:
            future.result()


def _view(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
