"""fused_linear: a linear layer with the norm before it and the gate or residual sum after it.

At few tokens a step reads each weight once and does little else, so whatever is a kernel of its
own next to a product costs a launch and a gap in that reading.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..moe.gates import activate
from ..norm.rms_norm import rms_norm
from ..op import register_op


@register_op(
    "fused_linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? norm_weight=None, "
    "bool norm=False, float eps=0.0, float norm_offset=0.0, bool cast_before_weight=True, "
    "str activation='', bool gated=False, Tensor? residual=None, "
    "Tensor? scaled=None, Tensor? squares=None) -> Tensor",
    capturable=True,
)
def fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm: bool = False,
    eps: float = 0.0,
    norm_offset: float = 0.0,
    cast_before_weight: bool = True,
    activation: str = "",
    gated: bool = False,
    residual: torch.Tensor | None = None,
    scaled: torch.Tensor | None = None,
    squares: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N], or [..., N / 2] if gated.

    residual + gate(linear(rms_norm(x))), each part if asked for. norm: x is normed first, see
    `rms_norm` for norm_weight [K], eps, norm_offset and cast_before_weight. gated: the first half
    of the product goes through `activation`, a name of `moe.gates.ACTIVATIONS`, and multiplies the
    second; otherwise all of it does. residual has the result's shape; one in float32 makes the
    result float32. x has the weight's dtype, or is float32 if it is normed.

    The reference rounds wherever separate ops do. Implementations may round less: leave a normed
    row or a product in float32 until the residual is added, and round the sum once. scaled [..., K]
    and squares [..., P]: what `add_linear_scaled` returned for this norm when it wrote x, which an
    implementation may read in place of x.

    Raises:
        OpError: there is no activation of that name.
    """
    if norm:
        x = rms_norm.reference(x, norm_weight, eps, norm_offset, cast_before_weight)
        x = x.to(weight.dtype)
    y = F.linear(x, weight, bias)
    if gated:
        first, second = y.chunk(2, dim=-1)
        y = activate(first, activation or "linear") * second
    elif activation:
        y = activate(y, activation)
    return y if residual is None else residual + y


@fused_linear.fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm: bool = False,
    eps: float = 0.0,
    norm_offset: float = 0.0,
    cast_before_weight: bool = True,
    activation: str = "",
    gated: bool = False,
    residual: torch.Tensor | None = None,
    scaled: torch.Tensor | None = None,
    squares: torch.Tensor | None = None,
) -> torch.Tensor:
    width = weight.shape[0] // 2 if gated else weight.shape[0]
    dtype = weight.dtype
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
    return x.new_empty((*x.shape[:-1], width), dtype=dtype)
