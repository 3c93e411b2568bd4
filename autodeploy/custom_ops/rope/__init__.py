"""Rotary position embedding: its table, and queries and keys turned by it."""

from . import native_cpu as _native_cpu  # noqa: F401 - registers the implementation
from . import triton_rope as _triton_rope  # noqa: F401 - registers the implementation
from . import triton_table as _triton_table  # noqa: F401 - registers the implementation
from .rope import rope
from .rotary_table import rotary_table

__all__ = ["rope", "rotary_table"]
