"""From logits to tokens, without the host."""

from . import triton_sampling as _triton_sampling  # noqa: F401 - registers the implementations
from .argmax_rows import argmax_rows
from .mask_logits import mask_logits
from .relay_best import relay_best
from .sample_rows import sample_rows

__all__ = ["argmax_rows", "mask_logits", "relay_best", "sample_rows"]
