"""Mixtures of experts: the experts are one op, the most usual router another."""

from . import triton_experts as _triton_experts  # noqa: F401 - registers the implementation
from .experts import experts
from .gates import ACTIVATIONS, gate

__all__ = ["ACTIVATIONS", "experts", "gate"]
