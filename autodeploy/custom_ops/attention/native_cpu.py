"""paged_attention in C: reads keys and values where they lie, in their pages."""

from __future__ import annotations

import struct
from pathlib import Path

import torch

from ..native import Kernel
from ..op import Choice, OpError
from .paged_attention import paged_attention

_KERNEL = Kernel(Path(__file__).with_name("paged_attention.c"), "paged_attention")
# The C struct `Call`: 12 pointers, 22 integers, 2 floating-point numbers.
_CALL = struct.Struct("12Q22q2d")
_DTYPES = (torch.float32, torch.bfloat16)
_METADATA = {
    "cu_q": torch.int32, "kv_len": torch.int32, "block_table": torch.int32, "slot": torch.int64,
}  # fmt: skip


def _applies(choice: Choice) -> bool:
    dtypes = {choice.args[name].dtype for name in ("q", "k", "v", "k_cache", "v_cache")}
    return (
        choice.device.type == "cpu"
        and len(dtypes) == 1
        and dtypes <= set(_DTYPES)
        and all(choice.args[name].dtype is dtype for name, dtype in _METADATA.items())
        and _KERNEL.ready("paged_attention", "torch_cpu")
    )


@paged_attention.implement("native_cpu", when=_applies, priority=2)
def native_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cu_q: torch.Tensor,
    kv_len: torch.Tensor,
    block_table: torch.Tensor,
    slot: torch.Tensor,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `paged_attention`; q, k, v and both caches of one dtype, float32 or bfloat16.

    cu_q, kv_len and block_table are int32, slot is int64. A cache may be a slice of a wider one.

    Raises:
        OpError: the slots of a cache are not evenly spaced, or a row of it is not contiguous.
    """
    if q.stride(2) != 1 or k.stride(2) != 1 or v.stride(2) != 1:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    alibi_slopes = None if alibi_slopes is None else alibi_slopes.float().contiguous()
    cu_q, kv_len, slot = cu_q.contiguous(), kv_len.contiguous(), slot.contiguous()
    block_table = block_table.contiguous()
    tokens, heads, width = q.shape
    _, page_size, kv_heads, value_width = v_cache.shape
    sequences, table_width = block_table.shape
    out = q.new_empty((tokens, heads, value_width))
    failed = _KERNEL(
        _CALL.pack(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
            cu_q.data_ptr(), kv_len.data_ptr(), block_table.data_ptr(), slot.data_ptr(),
            0 if sinks is None else sinks.data_ptr(),
            0 if alibi_slopes is None else alibi_slopes.data_ptr(), out.data_ptr(),
            tokens, sequences, kv_heads, heads // kv_heads, width, value_width, page_size,
            table_width, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0),
            v.stride(1), _slot_stride(k_cache), k_cache.stride(2), _slot_stride(v_cache),
            v_cache.stride(2), window, chunk, q.dtype is torch.bfloat16, torch.get_num_threads(),
            scale, softcap,
        )
    )  # fmt: skip
    if failed:
        raise MemoryError("paged_attention: no memory for the scores of one block of keys")
    return out


def _slot_stride(cache: torch.Tensor) -> int:
    """Numbers from one slot of [pages, page_size, heads, width] to the next, across pages too."""
    page, slot, _, number = cache.stride()
    page_size = cache.shape[1]
    if number != 1 or (page_size != 1 and page != page_size * slot):
        raise OpError(
            f"paged_attention: a cache of shape {tuple(cache.shape)} has strides "
            f"{cache.stride()}, so its slots cannot be addressed by one number; give it as "
            "[pages, page_size, heads, width] in memory"
        )
    return page if page_size == 1 else slot
