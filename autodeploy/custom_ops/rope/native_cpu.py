"""rope in C: one call for queries and keys, where torch takes twelve operations."""

from __future__ import annotations

import struct
from pathlib import Path

import torch

from ..native import Kernel
from ..op import Choice
from .rope import rope

_KERNEL = Kernel(Path(__file__).with_name("rope.c"), "rope")
# The C struct `Call`: 6 pointers, 15 integers.
_CALL = struct.Struct("6Q15q")
_DTYPES = (torch.float32, torch.bfloat16)


def _applies(choice: Choice) -> bool:
    tensors = [choice.args[name] for name in ("q", "k", "cos", "sin")]
    q, k, cos, sin = tensors
    return (
        choice.device.type == "cpu"
        and q.dtype in _DTYPES
        and len({t.dtype for t in tensors}) == 1
        and q.dim() == k.dim() == 4
        and cos.dim() == sin.dim() == 3
        and all(t.shape[0] == 1 for t in tensors)
        and q.shape[3] == k.shape[3]
        and cos.shape[2] % 2 == 0
        and choice.args["unsqueeze_dim"] in (1, 2)
        and _KERNEL.ready("rope", "reference")
    )


@rope.implement("native_cpu", when=_applies, priority=1)
def native_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    unsqueeze_dim: int = 1,
    cast: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `rope`; a batch of 1 and one dtype, float32 or bfloat16."""
    q, k, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, cos, sin))
    head, token = (1, 2) if unsqueeze_dim == 1 else (2, 1)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    _KERNEL(
        _CALL.pack(
            q.data_ptr(), k.data_ptr(), cos.data_ptr(), sin.data_ptr(), q_out.data_ptr(),
            k_out.data_ptr(), q.shape[token], q.shape[head], k.shape[head], q.shape[3],
            cos.shape[2], q.stride(token), q.stride(head), k.stride(token), k.stride(head),
            cos.stride(1), sin.stride(1), head == 1, interleaved, q.dtype is torch.bfloat16,
            torch.get_num_threads(),
        )
    )  # fmt: skip
    return q_out, k_out
