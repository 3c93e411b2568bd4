"""Preparing a step's inputs on the device."""

from .resolve_tokens import resolve_tokens

__all__ = ["resolve_tokens"]
