"""Normalisation over the last dimension."""

from . import native_cpu as _native_cpu  # noqa: F401 - registers the implementation
from .rms_norm import rms_norm

__all__ = ["rms_norm"]
