"""Token mixers whose past is a state of fixed size: short convolutions and recurrences.

Each op comes in a functional form over packed sequences and a cached form that continues from
rows of a per-sequence cache. The cached forms differ from the functional ones only in where a
sequence's first state comes from and its last one goes.
"""

from . import triton_conv as _triton_conv  # noqa: F401 - these register implementations
from . import triton_conv_delta as _triton_conv_delta  # noqa: F401
from . import triton_conv_ssd as _triton_conv_ssd  # noqa: F401
from . import triton_delta as _triton_delta  # noqa: F401
from . import triton_selective as _triton_selective  # noqa: F401
from . import triton_ssd as _triton_ssd  # noqa: F401
from .causal_conv1d import ACTIVATIONS, cached_causal_conv1d, causal_conv1d
from .conv_delta import conv_delta_rule
from .conv_ssd import conv_ssd_scan
from .delta_rule import (
    cached_gated_delta_rule,
    cached_kimi_delta_attention,
    gated_delta_rule,
    kimi_delta_attention,
)
from .selective_scan import cached_selective_scan, selective_scan
from .ssd_scan import cached_ssd_scan, ssd_scan

__all__ = [
    "ACTIVATIONS",
    "cached_causal_conv1d",
    "cached_gated_delta_rule",
    "cached_kimi_delta_attention",
    "cached_selective_scan",
    "cached_ssd_scan",
    "causal_conv1d",
    "conv_delta_rule",
    "conv_ssd_scan",
    "gated_delta_rule",
    "kimi_delta_attention",
    "selective_scan",
    "ssd_scan",
]
