"""The cache marker: a cache that keeps nothing and leaves a `cache_mark` node at every update.

What a model gives its own cache is not always what its attention reads: with multi-head latent
attention (DeepSeek-V2, 2024) it is the latent, a few hundred numbers a token, of which keys and
values are expanded afterwards. A transform that wants to cache that finds it by these nodes.
Marks are identities; `canonicalize` takes out those that nobody used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from transformers.cache_utils import DynamicCache

from autodeploy.custom_ops.attention import cache_mark

from ..program import Program
from ..transform import is_call


class MarkerCache(DynamicCache):
    """Looks empty at every question, so that a model takes its path for a first prompt."""

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Marks the pair and gives it back."""
        key, value = cache_mark(key_states, value_states, layer_idx)
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        return False


@dataclass(frozen=True)
class Mark:
    """What one layer gives its cache: nodes of [1, H, T, D] and [1, G, T, E]."""

    node: fx.Node
    layer: int
    key: fx.Node
    value: fx.Node


def marks(program: Program) -> list[Mark]:
    """The marks of a program, in order."""
    return [
        Mark(node, node.args[2], node.args[0], node.args[1])
        for node in program.graph.nodes
        if is_call(node, cache_mark.overload)
    ]
