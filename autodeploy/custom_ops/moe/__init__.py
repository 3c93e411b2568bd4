"""Mixtures of experts: the experts are one op, the most usual router another."""

from . import triton_experts as _triton_experts  # noqa: F401 - registers the implementation
from . import triton_route as _triton_route  # noqa: F401 - registers the implementation
from . import triton_routed as _triton_routed  # noqa: F401 - registers the implementation
from .experts import experts
from .gates import ACTIVATIONS, gate
from .route import route
from .routed import routed

__all__ = ["ACTIVATIONS", "experts", "gate", "route", "routed"]
