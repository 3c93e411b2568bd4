"""Causal depthwise convolution over packed sequences: each channel looks back K - 1 tokens.

Used before the scans of Mamba and the delta rules, and alone as a short-convolution mixer. The
state of a sequence is its last K - 1 inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import CacheSpec
from ..op import Cached, OpError, register_op
from .recurrence import (
    CachedStates,
    Drive,
    FreshStates,
    Recurrence,
    States,
    Tokens,
    implement_by_block,
    token_by_token,
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
"""What the `activation` argument may name, besides None."""

# One call covers a whole prompt: shifted sums need no intermediate larger than the input.
_WHOLE_SEQUENCE = 1 << 30


@register_op(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor cu_q, str? activation=None)"
    " -> Tensor",
    axes="t^ c, c k^, c, n^ -> t^ c",
)
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_q: Tensor,
    activation: str | None = None,
    *,
    drive: Drive = token_by_token,
) -> Tensor:
    """activation(sum over k of weight[:, k] * x[t - K + 1 + k] + bias), within each sequence.

    x [T, C], weight [C, K], bias [C], cu_q [B + 1] int32 -> [T, C] in x's dtype. Products are
    summed in float32 and rounded to the weight's dtype before the activation. Tokens before the
    first count as zeros.

    Raises:
        OpError: `activation` is none of `ACTIVATIONS`.
    """
    shape = (weight.shape[0], weight.shape[1] - 1)
    states = FreshStates(shape, x.dtype, x.device)
    return _convolve(drive, states, x, weight, bias, cu_q, activation)


@register_op(
    "cached_causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) conv_state,"
    " Tensor cu_q, Tensor kv_len, Tensor state_slot, str? activation=None) -> Tensor",
    axes="t^ c, c k^, c, s^ c j^, n^, b^, b^ -> t^ c",
)
def cached_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    cu_q: Tensor,
    kv_len: Tensor,
    state_slot: Tensor,
    activation: str | None = None,
    *,
    drive: Drive = token_by_token,
) -> Tensor:
    """`causal_conv1d` whose earlier inputs are in conv_state [slots, C, K - 1], oldest first.

    kv_len [B] int32, state_slot [B] int64. A sequence without new tokens leaves its row alone.
    """
    states = CachedStates(conv_state, cu_q, kv_len, state_slot)
    return _convolve(drive, states, x, weight, bias, cu_q, activation)


def _fake(x: Tensor, *others: Any, **flags: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _caches(arguments: Mapping[str, Any]) -> tuple[CacheSpec, ...]:
    channels, width = arguments["weight"].shape
    dtype = arguments["x"].dtype
    return (CacheSpec("conv_state", (channels, width - 1), dtype, per="sequence"),)


causal_conv1d.cached = Cached(op=cached_causal_conv1d, caches=_caches)
for _op in (causal_conv1d, cached_causal_conv1d):
    _op.fake(_fake)
    implement_by_block(_op)


def _convolve(
    drive: Drive,
    states: States,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_q: Tensor,
    activation: str | None,
) -> Tensor:
    if activation is not None and activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise OpError(f"causal_conv1d knows no activation '{activation}'; it knows {known}")
    out = x.new_zeros(x.shape, dtype=torch.float32)
    out = drive(_recurrence(weight.float()), (x,), out, states, cu_q)
    if bias is not None:
        out = out + bias.float()
    out = out.to(weight.dtype)
    if activation is not None:
        out = ACTIVATIONS[activation](out)
    return out.to(x.dtype)


def _recurrence(weight: Tensor) -> Recurrence:
    width = weight.shape[1]

    def step(tokens: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
        (x,) = tokens
        window = torch.cat([state, x.unsqueeze(-1)], dim=-1)
        return (window * weight).sum(-1), window[..., 1:]

    def block(tokens: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
        (x,) = tokens
        length = x.shape[0]
        extended = torch.cat([state.t(), x])
        out = extended[:length] * weight[:, 0]
        for tap in range(1, width):
            out.addcmul_(extended[tap : tap + length].to(out.dtype), weight[:, tap])
        return out, extended[length:].t()

    return Recurrence(step, block, _WHOLE_SEQUENCE)
