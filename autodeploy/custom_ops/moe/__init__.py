"""Mixtures of experts: routing stays plain torch ops, the experts are one op."""

from .experts import experts
from .gates import ACTIVATIONS, gate

__all__ = ["ACTIVATIONS", "experts", "gate"]
