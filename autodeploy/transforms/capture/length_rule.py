"""Which lengths give a model other keys, and at which it drops its cache and starts again.

The second is asked of the model itself: its `prepare_inputs_for_generation` gets a filled cache
and one token more, below, at and above each length in question.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers.cache_utils import DynamicCache

from autodeploy.custom_ops.contract import LengthRule

from .rope_lengths import LengthRotary, UnknownLengthsError


def length_rule(model: nn.Module, rotaries: list[LengthRotary]) -> LengthRule | None:
    """The rule of a model with these rotary modules; None without any.

    Raises:
        CaptureError: when the model drops its cache could not be found out.
    """
    if not rotaries:
        return None
    growing = [r.threshold for r in rotaries if r.grows]
    steps = sorted({r.threshold for r in rotaries if not r.grows})
    stated = {getattr(r.module.config, "original_max_position_embeddings", None) for r in rotaries}
    lengths = {n for n in {*growing, *steps, *stated} if isinstance(n, int) and n > 1}
    return LengthRule(tuple(steps), min(growing, default=None), _drop(model, sorted(lengths)))


def extended_positions(stated: int | None, rotaries: list[LengthRotary]) -> int | None:
    """Longest sequence of a model whose config states the length it was trained at.

    Frequencies that grow with the length start to at `max_position_embeddings`, and are made
    for sequences longer by the factor given.
    """
    factors = [
        (r.module.config.rope_parameters[r.layer_type] if r.layer_type else
         r.module.config.rope_parameters).get("factor") or 1.0
        for r in rotaries if r.grows
    ]  # fmt: skip
    return stated if stated is None else int(stated * max([1.0, *factors]))


def _drop(model: nn.Module, lengths: list[int]) -> int | None:
    """The length after which the model drops its cache; None if it keeps it at all of them."""
    dropped = [n for n in lengths if not _keeps_cache(model, n)]
    if not dropped:
        return None
    if len(dropped) > 1 or not all(_keeps_cache(model, dropped[0] + by) for by in (-1, 1)):
        raise UnknownLengthsError(
            f"{type(model).__name__} drops its cache after {dropped[0]} tokens and after others: "
            "when it starts again could not be found out"
        )
    return dropped[0]


def _keeps_cache(model: Any, length: int) -> bool:
    """Whether one token after `length` cached ones is computed with that cache."""
    with _disable_current_modes(), torch.no_grad(), torch.device("cpu"):
        cache = DynamicCache()
        cache.update(torch.zeros(1, 1, length, 1), torch.zeros(1, 1, length, 1), 0)
        ids = torch.zeros(1, length + 1, dtype=torch.int64)
        try:
            prepared = model.prepare_inputs_for_generation(
                ids, past_key_values=cache, attention_mask=torch.ones_like(ids), use_cache=True
            )
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
            raise UnknownLengthsError(
                f"{type(model).__name__}.prepare_inputs_for_generation cannot be asked whether it "
                f"keeps a cache of {length} tokens: {error}"
            ) from error
    return prepared.get("past_key_values") is not None
