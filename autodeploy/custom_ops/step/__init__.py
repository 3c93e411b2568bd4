"""Preparing a step's inputs on the device."""

from . import triton_step as _triton_step  # noqa: F401 - registers the implementation
from .resolve_tokens import resolve_tokens

__all__ = ["resolve_tokens"]
