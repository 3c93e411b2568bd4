"""Attention: the functional form capture records, and the paged form that serves."""

from .attention import attention
from .paged_attention import paged_attention

__all__ = ["attention", "paged_attention"]
