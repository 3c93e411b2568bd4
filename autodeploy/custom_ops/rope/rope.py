"""rope: rotates pairs of a head's channels by position (Su et al., 2021)."""

from __future__ import annotations

import torch

from ..op import register_op


@register_op(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved=False, "
    "int unsqueeze_dim=1, bool cast=False) -> (Tensor, Tensor)",
    axes="b hq t d^, b hk t d^, b t r^, b t r^ -> b hq t d^, b hk t d^",
    capturable=True,
)
def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    unsqueeze_dim: int = 1,
    cast: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [1, Hq, T, D], k [1, Hkv, T, D], cos and sin [1, T, R] with R <= D -> rotated q and k.

    Channels past R pass through. unsqueeze_dim=2: q and k are [1, T, H, D].
    interleaved: pairs are neighbours (0, 1), (2, 3), .., and the table's first half is used, each
    entry for one pair; otherwise pairs are (i, i + R / 2), as in GPT-NeoX. Where the table has the
    wider dtype heads are turned in it, and with `cast` come back in their own.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    if interleaved:
        half = cos.shape[-1] // 2
        cos = cos[..., :half].repeat_interleave(2, dim=-1)
        sin = sin[..., :half].repeat_interleave(2, dim=-1)
    turned = _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)
    return (turned[0].to(q.dtype), turned[1].to(k.dtype)) if cast else turned


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        other = torch.stack((-turned[..., 1::2], turned[..., 0::2]), dim=-1).flatten(-2)
    else:
        half = width // 2
        other = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
    result = turned * cos + other * sin
    return torch.cat((result, rest), dim=-1) if width < x.shape[-1] else result.contiguous()


@rope.fake
def _(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    interleaved: bool = False, unsqueeze_dim: int = 1, cast: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    own, other = (x.dtype if cast else torch.promote_types(x.dtype, cos.dtype) for x in (q, k))
    return q.new_empty(q.shape, dtype=own), k.new_empty(k.shape, dtype=other)
