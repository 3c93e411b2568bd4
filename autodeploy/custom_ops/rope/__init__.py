"""Rotary position embedding, applied to queries and keys."""

from . import native_cpu as _native_cpu  # noqa: F401 - registers the implementation
from .rope import rope

__all__ = ["rope"]
