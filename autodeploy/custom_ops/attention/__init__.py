"""Attention: the functional form capture records, and the paged form that serves."""

from . import native_cpu as _native_cpu  # noqa: F401 - registers the implementation
from . import torch_cpu as _torch_cpu  # noqa: F401 - registers the implementation
from . import triton_latent as _triton_latent  # noqa: F401 - registers the implementation
from . import triton_paged as _triton_paged  # noqa: F401 - registers the implementation
from . import triton_rotary as _triton_rotary  # noqa: F401 - registers the implementation
from . import triton_rotary_latent as _triton_rotary_latent  # noqa: F401 - registers it
from .attention import attention
from .cache_mark import cache_mark
from .cached_latent_attention import cached_latent_attention
from .latent_attention import latent_attention
from .packed_mask import packed_mask
from .paged_attention import paged_attention
from .rotary_latent_attention import rotary_latent_attention
from .rotary_paged_attention import rotary_paged_attention

__all__ = [
    "attention",
    "cache_mark",
    "cached_latent_attention",
    "latent_attention",
    "packed_mask",
    "paged_attention",
    "rotary_latent_attention",
    "rotary_paged_attention",
]
