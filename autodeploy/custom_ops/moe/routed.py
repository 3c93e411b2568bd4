"""routed: the norm before a router, its product, and which experts it chooses.

At few tokens these are small things in a row, and what counts is how many. The normed rows come
out too: experts read them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..norm.rms_norm import rms_norm
from ..op import register_op
from .route import route


@register_op(
    "routed(Tensor x, Tensor weight, int k, bool normalize, ScalarType dtype, int shared=0, "
    "int gate=0, Tensor? bias=None, bool wide=False, Tensor? norm_weight=None, bool norm=False, "
    "float eps=0.0, float norm_offset=0.0, bool cast_before_weight=True) "
    "-> (Tensor, Tensor, Tensor)",
    capturable=True,
)
def routed(
    x: torch.Tensor,
    weight: torch.Tensor,
    k: int,
    normalize: bool,
    dtype: torch.dtype,
    shared: int = 0,
    gate: int = 0,
    bias: torch.Tensor | None = None,
    wide: bool = False,
    norm_weight: torch.Tensor | None = None,
    norm: bool = False,
    eps: float = 0.0,
    norm_offset: float = 0.0,
    cast_before_weight: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, H], weight [E, H], bias [E] -> index int64, weights [T, shared + k], normed [T, H].

    Of the normed rows, or of x as it is unless `norm`; then normed is empty, [0, H]. Logits are of
    x's dtype, or of float32 all along if `wide`. See `route` for k, normalize, dtype, shared and
    gate, which is a row of weight here; `rms_norm` for norm_weight [H], eps, norm_offset and
    cast_before_weight. Implementations may compute logits from rows that are rounded less or
    elsewhere.
    """
    normed = x[:0].clone()
    if norm:
        x = normed = rms_norm.reference(x, norm_weight, eps, norm_offset, cast_before_weight)
    if wide:
        logits = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    else:
        logits = F.linear(x, weight, bias)
    return (*route.reference(logits, k, normalize, dtype, shared, gate), normed)


@routed.fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    k: int,
    normalize: bool,
    dtype: torch.dtype,
    shared: int = 0,
    gate: int = 0,
    bias: torch.Tensor | None = None,
    wide: bool = False,
    norm_weight: torch.Tensor | None = None,
    norm: bool = False,
    eps: float = 0.0,
    norm_offset: float = 0.0,
    cast_before_weight: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (x.shape[0], shared + k)
    index, weights = x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=dtype)
    return index, weights, x.new_empty((x.shape[0] if norm else 0, x.shape[1]))
