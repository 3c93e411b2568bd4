"""What a program must read and compute, and how fast a device can do that at best."""

from .count import VIEWS, cost_of
from .floor import floor_seconds, prefill_floor_seconds, workload_floor_seconds
from .peaks import Peaks, peaks_of

__all__ = [
    "VIEWS",
    "Peaks",
    "cost_of",
    "floor_seconds",
    "peaks_of",
    "prefill_floor_seconds",
    "workload_floor_seconds",
]
