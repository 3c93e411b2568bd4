"""The product inside a gated feed-forward layer."""

from . import triton_gate as _triton_gate  # noqa: F401 - registers the implementation
from .gated_activation import gated_activation

__all__ = ["gated_activation"]
