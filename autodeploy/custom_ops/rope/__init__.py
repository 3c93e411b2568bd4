"""Rotary position embedding, applied to queries and keys."""

from .rope import rope

__all__ = ["rope"]
