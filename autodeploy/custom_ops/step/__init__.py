"""Preparing a step's inputs on the device."""

from . import triton_step as _triton_step  # noqa: F401 - registers the implementations
from .open_step import FIELDS, open_step
from .place_pages import place_pages
from .relay_tokens import relay_tokens
from .resolve_tokens import resolve_tokens

__all__ = ["FIELDS", "open_step", "place_pages", "relay_tokens", "resolve_tokens"]
