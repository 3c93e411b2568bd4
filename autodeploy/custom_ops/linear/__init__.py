"""Matrix products with what stands before and after them."""

from . import triton_linear as _triton_linear  # noqa: F401 - registers the implementation
from .add_linear import add_linear
from .fused_linear import fused_linear

__all__ = ["add_linear", "fused_linear"]
