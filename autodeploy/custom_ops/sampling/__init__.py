"""Choosing tokens on the device."""

from . import triton_argmax as _triton_argmax  # noqa: F401 - registers the implementation
from .argmax_rows import argmax_rows

__all__ = ["argmax_rows"]
