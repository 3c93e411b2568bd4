"""Whether a program still computes what the model computes."""

from .check import Reference, SequenceCheck, reference_logits, tolerance

__all__ = ["Reference", "SequenceCheck", "reference_logits", "tolerance"]
