"""Giving memory back to the operating system while its owner still holds the address.

A checkpoint is mapped from its file as a whole, and one tensor of it cannot be unmapped alone;
a model object keeps its parameters until it is dropped, on whatever device they are. Both would
count twice once their contents are joined into another tensor.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys

import torch

_DONT_NEED = 4


@functools.cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def drop_memory_pages(tensor: torch.Tensor) -> None:
    """Frees the memory of a tensor nobody will read again, which keeps its shape.

    On the CPU: the whole memory pages inside a contiguous tensor; on Linux only, and of tensors
    under a page nothing: they are freed with their owner. Elsewhere: its storage, unless that
    holds more than this tensor.
    """
    if tensor.device.type != "cpu":
        storage = tensor.untyped_storage()
        if storage.nbytes() == tensor.nbytes:
            storage.resize_(0)
        return
    libc = _libc()
    if libc is None or not tensor.is_contiguous():
        return
    size = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // size) * size
    last = (tensor.data_ptr() + tensor.nbytes) // size * size
    if last > first:
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _DONT_NEED)


def return_unused_blocks(device: torch.device) -> None:
    """Has torch's allocator give freed blocks back: it would keep them for tensors of their size.

    Joined weights are larger than what they are made of, so they never fit those blocks.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
