"""What graph nodes mean, and every way to run them. Importing this registers every op."""

from . import attention, gate, linear, module, moe, norm, rope, sampling, state, step

__all__ = [
    "attention",
    "gate",
    "linear",
    "module",
    "moe",
    "norm",
    "rope",
    "sampling",
    "state",
    "step",
]
