"""paged_attention on the CPU: a C kernel for few new tokens, torch's own attention for many.

Decode reads every key and value once and does little with them: the kernel reads them straight
from their pages. A long prompt is matrix products, which torch does better, so its keys and
values are gathered first.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
import torch.nn.functional as F

from ..native import load
from ..op import Choice
from .paged_attention import attend, first_visible, paged_attention

SOURCE = Path(__file__).with_suffix("").parent / "paged_attention.c"
# Up to this many new tokens of a sequence the kernel is faster than gathering its pages.
FEW_TOKENS = 8

_FUNCTIONS = {torch.float32: "paged_attention_f32", torch.bfloat16: "paged_attention_bf16"}


class _Sizes(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "sequences", "kv_heads", "groups", "width", "value_width", "page_size",
            "table_width", "max_new", "q_token", "q_head", "k_token", "k_head", "v_token",
            "v_head", "window", "chunk", "threads", "tokens",
        )),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]  # fmt: skip


def _applies(choice: Choice) -> bool:
    dtypes = {choice.args[name].dtype for name in ("q", "k", "v", "k_cache", "v_cache")}
    return (
        choice.device.type == "cpu"
        and len(dtypes) == 1
        and dtypes <= set(_FUNCTIONS)
        and load(SOURCE) is not None
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
    """As `paged_attention`; one dtype, float32 or bfloat16."""
    # The kernel takes rows of any stride, but their elements side by side.
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    tokens, heads, width = q.shape
    kv_heads, value_width = v.shape[1:]
    out = torch.empty((tokens, heads, value_width), dtype=q.dtype)
    sizes = _Sizes(
        len(kv_len), kv_heads, heads // kv_heads, width, value_width, k_cache.shape[1],
        block_table.shape[1], FEW_TOKENS, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        v.stride(0), v.stride(1), window, chunk, torch.get_num_threads(), tokens, scale, softcap,
    )  # fmt: skip
    extra = [None if t is None else t.float().contiguous() for t in (sinks, alibi_slopes)]
    library = load(SOURCE)
    failed = library[_FUNCTIONS[q.dtype]](  # type: ignore[index]
        ctypes.byref(sizes),
        *(
            ctypes.c_void_p(0 if t is None else t.data_ptr())
            for t in (q, k, v, k_cache, v_cache, cu_q, kv_len, block_table, slot, *extra, out)
        ),
    )
    if failed:
        raise MemoryError("paged_attention: no memory for the scores of one sequence")
    if tokens > len(kv_len):
        _attend_many(
            out, q, k_cache, v_cache, cu_q, kv_len, block_table, scale, window, chunk, softcap,
            sinks, alibi_slopes,
        )  # fmt: skip
    return out


def _attend_many(
    out: torch.Tensor, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    cu_q: torch.Tensor, kv_len: torch.Tensor, block_table: torch.Tensor, scale: float,
    window: int, chunk: int, softcap: float, sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
) -> None:  # fmt: skip
    """Sequences that the kernel left out, one after the other, over gathered pages."""
    bounds, lengths, page_size = cu_q.tolist(), kv_len.tolist(), k_cache.shape[1]
    for index, length in enumerate(lengths):
        start, end = bounds[index], bounds[index + 1]
        if end - start <= FEW_TOKENS:
            continue
        first = first_visible(length - (end - start), window, chunk) // page_size
        pages = block_table[index, first : -(-length // page_size)].long()
        keys = k_cache[pages].flatten(0, 1)[: length - first * page_size]
        values = v_cache[pages].flatten(0, 1)[: length - first * page_size]
        if softcap or sinks is not None or alibi_slopes is not None or window or chunk:
            out[start:end] = attend(
                q[start:end], keys, values, scale, window, chunk, softcap, True, sinks,
                alibi_slopes, first * page_size,
            )  # fmt: skip
            continue
        whole = end - start == length
        mask = None if whole else _causal(end - start, length)
        found = F.scaled_dot_product_attention(
            q[start:end].transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=whole,
            scale=scale,
            enable_gqa=q.shape[1] != keys.shape[1],
        )
        out[start:end] = found[0].transpose(0, 1)


def _causal(queries: int, keys: int) -> torch.Tensor:
    """[queries, keys] bool: the last `queries` positions see themselves and what is before."""
    position = torch.arange(keys - queries, keys)
    return torch.arange(keys)[None, :] <= position[:, None]
