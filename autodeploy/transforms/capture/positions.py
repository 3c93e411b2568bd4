"""How many positions a model is made for."""

from __future__ import annotations

from typing import Any

from torch import nn

from .length_rule import extended_positions
from .rope_lengths import length_rotaries


def max_positions(model: nn.Module) -> int | None:
    """Longest sequence the model's config states, if it states one."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return extended_positions(value, length_rotaries(model))
    return None
