"""heads_linear in Triton at few tokens, where such a product is all latency; else cuBLAS."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import gpu
from ..op import Choice
from .heads_linear import heads_linear

FEW = 256
"""Tokens up to which weights are read again for each block of them, from the L2 cache."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class HeadTiles:
    """How one launch is cut up."""

    tokens: int
    rows: int
    """Of a head's weight, whole, in a program's registers."""
    warps: int


def head_tiles(
    tokens: int, heads: int, width: int, inner: int, itemsize: int, device: torch.device
) -> HeadTiles:
    """Tiles for weights [heads, width, inner]."""
    rows = 16384 // (_power(inner) * itemsize)
    if tokens > 32:
        # In us on an H200, 64 tokens, 16 heads and rows of 128 and of 512: 2.3 and 3.5; with half
        # the tokens and rows a program 2.7 and 4.2, in cuBLAS 3.6 and 3.7.
        return HeadTiles(64, min(max(32, rows), _power(width)), 4)
    block_t = 16 if tokens <= 16 else 32
    # 16 KiB of a weight are 32 registers a thread. Less, where every multiprocessor then has some:
    # weights are read before the wait, and the sooner the more programs share them.
    rows = max(16, rows)
    blocks = -(-tokens // block_t) * heads
    while rows > 16 and blocks * -(-width // rows) < gpu.multiprocessors(device.index or 0):
        rows //= 2
    return HeadTiles(block_t, min(rows, _power(width)), 4)


def multiply_heads(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, cut: HeadTiles | None = None
) -> None:
    """`heads_linear` of x [T, H, K] and weight [H, N, K] into out [T, H, N], a view maybe."""
    tokens, heads, inner = x.shape
    if not out.numel():
        return
    if tokens > FEW:
        torch.bmm(x.transpose(0, 1), weight.transpose(1, 2), out=out.transpose(0, 1))
        return
    from .heads_kernel import heads_linear_kernel

    if x.stride(2) != 1:
        x = x.contiguous()
    width = weight.shape[1]
    cut = cut or head_tiles(tokens, heads, width, inner, x.element_size(), x.device)
    pdl = gpu.overlaps_launches()
    heads_linear_kernel[(-(-width // cut.rows), heads, -(-tokens // cut.tokens))](
        x, weight, out, tokens, *x.stride()[:2], *weight.stride(), *out.stride()[:2],
        N=width, K=inner, BLOCK_T=cut.tokens, BLOCK_N=max(16, cut.rows),
        BLOCK_K=max(16, _power(inner)), PRECISION="tf32x3" if x.dtype is torch.float32 else "tf32",
        PDL=pdl, num_warps=cut.warps, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def _power(extent: int) -> int:
    """Smallest power of 2 that holds `extent`."""
    return 1 << (extent - 1).bit_length()


def applies(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `multiply_heads` takes rows of this width and dtype."""
    return x.dtype is weight.dtype and x.dtype in _DTYPES and x.shape[2] <= 1024


def _applies(choice: Choice) -> bool:
    return gpu.runs_triton(choice.device) and applies(choice.args["x"], choice.args["weight"])


@heads_linear.implement("triton", when=_applies, priority=10, capturable=True)
def triton_heads(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As `heads_linear`; one dtype."""
    out = x.new_empty((x.shape[0], x.shape[1], weight.shape[1]))
    multiply_heads(x, weight, out)
    return out
