"""Matrix products with what stands before and after them."""

from . import triton_heads as _triton_heads  # noqa: F401 - registers the implementation
from . import triton_linear as _triton_linear  # noqa: F401 - registers the implementation
from .add_linear import add_linear
from .add_linear_scaled import add_linear_scaled
from .fused_linear import fused_linear
from .heads_linear import heads_linear

__all__ = ["add_linear", "add_linear_scaled", "fused_linear", "heads_linear"]
