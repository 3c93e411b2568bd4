"""cached_causal_conv1d in Triton: one launch for decoding, two when there are more tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gpu
from ..op import Choice
from .causal_conv1d import ACTIVATIONS, cached_causal_conv1d
from .packed import FLOATS, check_rows, launch_options, power_of_two, whole_rows

_BLOCK = 256
_TOKENS = 32
_TOKENS_BLOCK = 128


def _applies(choice: Choice) -> bool:
    if not gpu.runs_triton(choice.device):
        return False
    x, weight, activation = (choice.args[name] for name in ("x", "weight", "activation"))
    known = activation is None or activation in ACTIVATIONS
    return known and x.dtype in FLOATS and weight.dtype in FLOATS and 2 <= int(weight.shape[1]) <= 8


@cached_causal_conv1d.implement("triton", when=_applies, priority=10, capturable=True)
def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    cu_q: Tensor,
    kv_len: Tensor,
    state_slot: Tensor,
    activation: str | None = None,
) -> Tensor:
    """As `cached_causal_conv1d`; K from 2 to 8."""
    from .conv_kernel import conv_step_kernel, conv_tokens_kernel

    tokens, channels = x.shape
    sequences, taps = len(state_slot), weight.shape[1]
    x, weight, conv_state = whole_rows(x), weight.contiguous(), check_rows(conv_state)
    out = torch.empty((tokens, channels), dtype=x.dtype, device=x.device)
    operands = (x, weight, weight if bias is None else bias, conv_state, cu_q, kv_len, state_slot)
    strides = (x.stride(0), conv_state.stride(0))
    named = {"swish": "silu", None: "linear"}.get(activation, activation)
    form = {"CHANNELS": channels, "TAPS": taps, "HAS_BIAS": bias is not None, "ACTIVATION": named}
    form |= launch_options()
    decoding = tokens == sequences
    if not decoding and tokens:
        conv_tokens_kernel[(-(-tokens // _TOKENS), -(-channels // _TOKENS_BLOCK))](
            *operands, out, tokens, sequences, *strides, BLOCK=_TOKENS_BLOCK,
            BLOCK_TOKENS=_TOKENS, SEARCH_STEPS=max(10, sequences.bit_length()), **form,
        )  # fmt: skip
    # After it: the states it reads are overwritten.
    conv_step_kernel[(-(-channels // _BLOCK), sequences)](
        *operands, out, sequences, *strides, BLOCK=_BLOCK, BLOCK_TAPS=power_of_two(taps),
        WITH_TOKENS=decoding, **form,
    )  # fmt: skip
    return out
