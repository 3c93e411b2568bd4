"""Staging: small arrays that reach the device together, in one copy that nobody waits for.

The host side is pinned memory, several times over: what the host writes for one step is not
overwritten while an earlier copy may still read it. Steps that sample nothing, the chunks of a
long prompt, are not waited for anywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes at which every array begins."""
RING = 3
"""Copies that may be under way; a step with tokens to hand out is prepared while one other runs,
so only steps without any come to where `Staging.next` waits."""

Shapes = Mapping[str, tuple[tuple[int, ...], type]]


class Staging:
    """Named arrays on the host and their counterparts on the device.

    Args:
        shapes: name -> (shape, numpy dtype).
    """

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        places, size = {}, 0
        for name, (shape, kind) in shapes.items():
            count = math.prod(shape) * np.dtype(kind).itemsize
            places[name] = (size, count, shape, np.dtype(kind))
            size += -(-count // ALIGNMENT) * ALIGNMENT
        pinned = device.type == "cuda"
        self._hosts = [
            torch.zeros(max(size, 1), dtype=torch.uint8, pin_memory=pinned) for _ in range(RING)
        ]
        self._device = torch.zeros(max(size, 1), dtype=torch.uint8, device=device)
        self._sent = [torch.cuda.Event() for _ in range(RING)] if pinned else []
        self._arrays = [
            {
                name: host.numpy()[at : at + count].view(kind).reshape(shape)
                for name, (at, count, shape, kind) in places.items()
            }
            for host in self._hosts
        ]
        self.tensors: dict[str, Tensor] = {
            name: self._device[at : at + count].view(_TORCH[kind]).view(shape)
            for name, (at, count, shape, kind) in places.items()
        }
        """On the device, at addresses that never change."""
        self._at = 0

    def next(self) -> dict[str, np.ndarray]:
        """Host arrays to fill; what they hold is from an earlier round, and has been copied."""
        self._at = (self._at + 1) % RING
        if self._sent:
            self._sent[self._at].synchronize()
        return self._arrays[self._at]

    def send(self) -> None:
        """Copies what was filled last to the device, in the order of its stream."""
        self._device.copy_(self._hosts[self._at], non_blocking=True)
        if self._sent:
            self._sent[self._at].record()


_TORCH = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device, in a copy that nobody waits for.

    For sizes that differ from step to step. Torch keeps pinned buffers that are let go of, and
    lends them again only when the copies out of them are done.
    """
    host = torch.from_numpy(array)
    if device.type == "cuda":
        host = torch.empty(host.shape, dtype=host.dtype, pin_memory=True).copy_(host)
    return host.to(device, non_blocking=True)


def receive(tensor: Tensor) -> Tensor:
    """A copy in pinned memory; filled once the stream has come to it, not before."""
    cuda = tensor.device.type == "cuda"
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=cuda)
    return host.copy_(tensor, non_blocking=True)
