"""Normalisation over the last dimension."""

from . import native_cpu as _native_cpu  # noqa: F401 - registers the implementation
from . import triton_norm as _triton_norm  # noqa: F401 - registers the implementations
from .add_rms_norm import add_rms_norm, rms_norm_add
from .rms_norm import rms_norm

__all__ = ["add_rms_norm", "rms_norm", "rms_norm_add"]
