"""Whether a program still computes what the model computes."""

from .check import SequenceCheck
from .reference import Reference, reference_logits

__all__ = ["Reference", "SequenceCheck", "reference_logits"]
