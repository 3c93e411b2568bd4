"""What a program is compared with: the plain model, each sequence alone, and its own noise.

In float32 two right programs agree to 1e-4. In low precision they do not, by how much is measured,
and of a model that amplifies rounding without bound a float32 stand-in is asked instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...errors import NotCausalError
from ..capture.module_probe import plain_model
from ..capture.positions import max_positions
from ..capture.rope_lengths import length_rotaries, lengths_forgotten
from .noise import MOST, rounding_noise
from .twin import stand_in

LENGTHS = (11, 6)
_PART = 7
_FOLLOWED = 43
EXACT = (torch.float32, torch.float64)
"""Dtypes in which rounding never hides a mistake."""


@dataclass(frozen=True)
class Reference:
    """Token ids and the plain model's logits [length, vocab] for them, per sequence."""

    token_ids: tuple[torch.Tensor, ...]
    logits: tuple[torch.Tensor, ...]
    implementation: str | None = None
    """The attention implementation they are of; None: the model's own choice."""
    noise: float = 0.0
    """Low precision: how far the logits move, of their range, if every operation rounds anew."""

    @property
    def tells(self) -> bool:
        """Whether a mistake can be told from rounding; False for models that amplify it."""
        return 2 * self.noise <= MOST

    def limit(self, dtype: torch.dtype) -> float:
        """Largest error of a program that counts as rounding."""
        return _limit(dtype, self.noise)


def reference_logits(
    model: nn.Module, seed: int = 0, lengths: Sequence[int] = LENGTHS
) -> Reference:
    """Runs the unmodified model on each sequence alone, without a cache.

    Raises:
        NotCausalError: later tokens change the logits of earlier ones.
    """
    ids = _sample(model, seed, lengths)
    _settle(model, ids[0][:1])
    implementation = causal_implementation(model, _sample(model, seed, [_longest(model)])[0])
    with plain_model(model, implementation):
        logits = tuple(_alone(model, i) for i in ids)
        noise = 0.0
        if next(model.parameters()).dtype not in EXACT:
            with rounding_noise(model):
                noise = largest_error([_alone(model, i) for i in ids], logits, exact=False)
    return Reference(ids, logits, implementation, noise)


def _settle(model: nn.Module, ids: torch.Tensor) -> None:
    """Some models change on their first forward, such as by scaling weights for inference."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            _alone(model, ids)
    finally:
        for module in training:
            module.training = True


def causal_implementation(model: nn.Module, ids: torch.Tensor) -> str | None:
    """The attention implementation under which earlier tokens do not see later ones.

    None: the model's own choice. Eager, if that loses its causality: some models make a mask of
    their own out of one that transformers leaves out where a kernel knows it is causal. Where few
    and many tokens may differ by rounding alone, without bound, a float32 stand-in is asked.

    Raises:
        NotCausalError: there is none.
    """
    dtype = next(model.parameters()).dtype
    errors, amplifies = [], False
    for implementation in (None, "eager"):
        with plain_model(model, implementation):
            whole, part = _alone(model, ids), _alone(model, _other_end(model, ids))
            errors.append(_moved(part, whole, dtype))
            if errors[-1] <= (10 if dtype in EXACT else 1) * tolerance(dtype):
                return implementation
            if dtype in EXACT:
                continue
            with rounding_noise(model):
                noise = _moved(_alone(model, ids), whole, dtype)
        if errors[-1] <= _limit(dtype, noise):
            return implementation
        amplifies |= 2 * noise > MOST
    if amplifies:
        exact = stand_in(model)
        return causal_implementation(exact, _sample(exact, 0, [_longest(exact)])[0])
    raise NotCausalError(
        f"{type(model).__name__} is not autoregressive: logits of the first {_PART} tokens change "
        f"by {errors[0]:.1e} of their range when {len(ids) - _PART} more follow"
    )


def _moved(found: torch.Tensor, whole: torch.Tensor, dtype: torch.dtype) -> float:
    """How far the first tokens' logits are from those in `whole`, of their range."""
    errors = (found[:_PART] - whole[:_PART]).abs().amax(-1) / whole.abs().max().clamp_min(1e-9)
    return _largest(errors, dtype in EXACT)


def _longest(model: nn.Module) -> int:
    """Long enough that blocks and buckets of tokens, if the model has any, come out otherwise."""
    return min(_FOLLOWED, max_positions(model) or _FOLLOWED)


def _sample(model: nn.Module, seed: int, lengths: Sequence[int]) -> tuple[torch.Tensor, ...]:
    device = next(model.parameters()).device
    vocab_size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    generator = torch.Generator().manual_seed(seed)
    # Each token once: equal tokens can make equal scores, and a top-k among equals is anyone's.
    return tuple(_distinct(vocab_size, length, generator).to(device) for length in lengths)


def _other_end(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The first tokens alone; where the length is known to matter, with others after them."""
    if not length_rotaries(model):
        return ids[:_PART]
    return torch.cat([ids[:_PART], ids[_PART:].flip(0)])


def _distinct(vocab_size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    low = min(8, vocab_size // 2)
    if vocab_size - low < count:
        return torch.randint(vocab_size, (count,), generator=generator)
    return torch.randperm(vocab_size - low, generator=generator)[:count] + low


def _alone(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    # Some rotary embeddings remember the longest sequence they have seen.
    with lengths_forgotten(length_rotaries(model)):
        logits: torch.Tensor = model(input_ids=ids[None], use_cache=False).logits[0].float()
    return logits


def tolerance(dtype: torch.dtype) -> float:
    """Largest difference of logits over their largest magnitude that counts as equal."""
    return 1e-4 if dtype in EXACT else 4e-2


def _limit(dtype: torch.dtype, noise: float) -> float:
    return max(tolerance(dtype), min(MOST, 2 * noise))


def largest_error(
    found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor], exact: bool
) -> float:
    """Largest difference over the largest magnitude, over all positions, or the better part."""
    pairs = zip(found, expected, strict=True)
    errors = torch.cat(
        [(a.float() - b).abs().amax(-1) / b.abs().max().clamp_min(1e-9) for a, b in pairs]
    )
    return _largest(errors, exact)


def _largest(errors: torch.Tensor, exact: bool) -> float:
    """Of all positions or, in low precision, of the better two thirds."""
    return float(errors.max() if exact else errors.quantile(2 / 3))
