"""Giving memory back to the operating system while its owner still holds the address.

A checkpoint is mapped from its file as a whole, and one tensor of it cannot be unmapped alone;
a model object keeps its parameters until it is dropped. Both would count twice once their
contents are joined into another tensor.
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
    """Frees the whole memory pages inside a contiguous CPU tensor nobody will read again.

    Elsewhere than on Linux, and for tensors under a page, nothing happens: they are freed with
    their owner.
    """
    libc = _libc()
    if libc is None or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    size = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // size) * size
    last = (tensor.data_ptr() + tensor.nbytes) // size * size
    if last > first:
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _DONT_NEED)
