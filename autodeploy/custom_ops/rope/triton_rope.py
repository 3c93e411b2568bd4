"""rope in Triton: one launch turns every head of a step, and can put keys and values in pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import gpu
from ..op import Choice
from .rope import rope

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class HeadNorm:
    """The norm of a head before it is turned; the numbers of op `rms_norm`."""

    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    q_eps: float | None
    k_eps: float | None
    offset: float = 0.0
    cast_before_weight: bool = True


@dataclass(frozen=True)
class Pages:
    """Where keys and values of a step go: the slots of `paged_attention`."""

    v: torch.Tensor
    """[T, Hkv, Dv]"""
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    slot: torch.Tensor


@dataclass(frozen=True)
class Tiles:
    """How one launch is cut up: numbers of q, or of k, that a program holds, and its warps."""

    numbers: int
    warps: int


PLAIN = HeadNorm(None, None, None, None)


def tiles(tokens: int) -> Tiles:
    """Small programs fill the device with few tokens, larger ones cost less with many."""
    return Tiles(512, 1) if tokens <= 64 else Tiles(2048, 2)


def turn_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    q_out: torch.Tensor,
    k_out: torch.Tensor | None = None,
    norm: HeadNorm = PLAIN,
    pages: Pages | None = None,
    cut: Tiles | None = None,
) -> None:
    """Normalises and turns q [T, Hq, D] into q_out, and k [T, Hkv, D] into k_out or its pages.

    cos and sin [1, T, R] or neither. Tensors may have any strides but in their last dimension,
    where it is 1; all have one dtype but slot, which is int64, and the table, maybe float32.
    """
    from .rotary_kernel import turn_heads_kernel

    tokens, heads, width = q.shape
    if not tokens:
        return
    rotated = 0 if cos is None else cos.shape[2]
    cos, sin = (q if t is None else t if t.stride(2) == 1 else t.contiguous() for t in (cos, sin))
    v, slot = (k, k) if pages is None else (pages.v, pages.slot.contiguous())
    kept = k_out if pages is None else pages.k_cache
    values = k if pages is None else pages.v_cache
    assert kept is not None
    # Without pages, a token's row is its page and nothing is inside it.
    k_strides = (kept.stride(0), 0, kept.stride(1)) if pages is None else kept.stride()[:3]
    v_strides = (0, 0, 0) if pages is None else values.stride()[:3]
    values_heads = 0 if pages is None else v.shape[1]
    cut = cut or tiles(tokens)
    block = max(1, cut.numbers // _power(width))
    block_q, block_kv = min(block, _power(heads)), min(block, _power(k.shape[1]))
    parts = -(-heads // block_q) + -(-k.shape[1] // block_kv) + -(-values_heads // block_kv)
    pdl = gpu.overlaps_launches()
    turn_heads_kernel[(tokens * parts,)](
        q, k, v, q_out, kept, values, cos, sin,
        q if norm.q_weight is None else norm.q_weight,
        q if norm.k_weight is None else norm.k_weight, slot,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *q_out.stride()[:2], *k_strides,
        *v_strides, cos.stride(1), sin.stride(1), norm.q_eps or 0.0, norm.k_eps or 0.0,
        norm.offset, HQ=heads, HKV=k.shape[1], HV=values_heads, D=width, DV=v.shape[2],
        HALF=rotated // 2, INTERLEAVED=interleaved, Q_NORM=norm.q_eps is not None,
        K_NORM=norm.k_eps is not None, Q_WEIGHT=norm.q_weight is not None,
        K_WEIGHT=norm.k_weight is not None, FIRST=norm.cast_before_weight,
        PAGED=pages is not None, PAGE=1 if pages is None else pages.k_cache.shape[1],
        BLOCK_Q=block_q, BLOCK_KV=block_kv, BLOCK_HALF=_power(max(rotated // 2, 1)),
        BLOCK_REST=_power(max(width - rotated, 1)), BLOCK_DV=_power(v.shape[2]), PDL=pdl,
        # Fused, a product and the sum after it would be rounded once, which torch does twice.
        enable_fp_fusion=False,
        num_warps=cut.warps, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def _power(extent: int) -> int:
    """Smallest power of 2 that holds `extent`."""
    return 1 << (extent - 1).bit_length()


def applies(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cast: bool = True
) -> bool:
    """Whether `turn_heads` takes heads of the last dimension of q and k and this table.

    cast: heads turned by a table in float32 are to come back in their own dtype.
    """
    width, rotated = q.shape[-1], cos.shape[-1]
    return (
        q.dtype is k.dtype
        and cos.dtype is sin.dtype
        and (cos.dtype is q.dtype or (cast and cos.dtype is torch.float32))
        and q.dtype in DTYPES
        and k.shape[-1] == width <= 1024
        and cos.dim() == sin.dim() == 3
        and cos.shape[0] == sin.shape[0] == 1
        and rotated == sin.shape[-1]
        and rotated % 2 == 0
        and rotated <= width
    )


def _applies(choice: Choice) -> bool:
    q, k, cos, sin = (choice.args[name] for name in ("q", "k", "cos", "sin"))
    return (
        gpu.runs_triton(choice.device)
        and q.dim() == k.dim() == 4
        and q.shape[0] == k.shape[0] == 1
        and choice.args["unsqueeze_dim"] in (1, 2)
        and applies(q, k, cos, sin, choice.args["cast"])
    )


@rope.implement("triton", when=_applies, priority=10, capturable=True)
def triton_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    unsqueeze_dim: int = 1,
    cast: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `rope`; a batch of 1, one dtype but that of the table."""
    q, k = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k))
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    rows = [t[0].transpose(0, 1) if unsqueeze_dim == 1 else t[0] for t in (q, k, q_out, k_out)]
    turn_heads(rows[0], rows[1], cos, sin, interleaved, rows[2], rows[3])
    return q_out, k_out
