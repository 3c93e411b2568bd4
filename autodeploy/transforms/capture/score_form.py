"""What a layer does to its scores before the softmax, told by evaluating it.

    softmax(f(scores)) with f(scores) = cap(scores · scale) + slope · (key - query), masked

f is given as something that can be run: on zeros it shows what is masked and what is added, on
random numbers how scores are scaled. A number added to a whole row is nothing to the softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ...errors import CaptureError
from .masks import Mask

Function = Callable[[torch.Tensor], torch.Tensor]
"""f for one length: scores [H, T, T] to what the softmax takes, float32 [H, T, T]."""

# A score this far below the highest of its row has a softmax weight of exactly zero. Masks that
# add -1e4 count; a linear bias at 2048 tokens of distance, with slopes up to 1, does not reach it.
_HIDDEN = 9e3


@dataclass(frozen=True)
class ScoreForm:
    """Arguments of the attention op that do what f does."""

    scale: float
    softcap: float
    mask: Mask
    slopes: tuple[float, ...] | None
    """One per head, or None if nothing is added."""


def score_form(
    functions: Sequence[tuple[int, Function]], heads: int, known: Mask | None, epsilon: float
) -> ScoreForm:
    """The form of f, which is given for several lengths; the longest comes last.

    known: the mask where it is known from elsewhere; else it is read off the longest length.
    epsilon: the relative rounding of the dtype in which f runs.

    Raises:
        CaptureError: f is nothing the attention op expresses; the message says what it looks like.
    """
    mask = known
    for length, function in reversed(functions):
        zero = torch.zeros(heads, length, length)
        base = function(zero)
        seen = _visible(base)
        mask = mask or _mask_of(seen)
        if mask is None or not torch.equal(seen, _expected(mask, length)):
            raise CaptureError("its mask is neither causal, sliding nor chunked")
        if not mask.causal:
            raise CaptureError("it is bidirectional: later tokens would change earlier ones")
        slopes = _slopes(base, seen, epsilon)
        if length == functions[-1][0]:
            expected = slopes
        elif not _close(slopes, expected, epsilon):
            raise CaptureError("its bias is no function the attention op expresses: it changes "
                               "with the number of tokens")  # fmt: skip
    scalings = [_scaling(*each, heads, epsilon) for each in functions[:2]]
    scale, softcap = scalings[0]
    if any(abs(other[0] - scale) > 1e-4 * abs(scale) for other in scalings):
        shown = ", then ".join(f"{each[0]:.5g}" for each in scalings)
        raise CaptureError(f"its scale changes with the number of tokens: {shown}")
    biased = bool(expected.abs().max() > 1e-7)
    assert mask is not None
    return ScoreForm(scale, softcap, mask, tuple(expected.tolist()) if biased else None)


def _visible(base: torch.Tensor) -> torch.Tensor:
    """[H, T, T] -> bool [T, T].

    Raises:
        CaptureError: heads see different keys.
    """
    seen = base > base.amax(-1, keepdim=True) - _HIDDEN
    if not bool((seen == seen[:1]).all()):
        raise CaptureError("its heads see different keys")
    return seen[0]


def _expected(mask: Mask, length: int) -> torch.Tensor:
    row = torch.arange(length)
    return mask.visible(row[:, None], row[None, :])


def _mask_of(seen: torch.Tensor) -> Mask | None:
    length = len(seen)

    def candidates() -> Iterator[Mask]:
        yield Mask()
        yield Mask(causal=False)
        first = int(seen[:, 0].sum())  # how many queries see the first key
        yield Mask(window=first)
        yield Mask(chunk=first)

    return next((m for m in candidates() if torch.equal(seen, _expected(m, length))), None)


def _slopes(base: torch.Tensor, seen: torch.Tensor, epsilon: float) -> torch.Tensor:
    """What f(0) adds, as one slope a head [H], float64.

    Raises:
        CaptureError: it is not linear in the distance.
    """
    row = torch.arange(base.shape[-1], dtype=torch.float64)
    distance = (row[None, :] - row[:, None]).where(seen, 0.0)
    squares = distance.square().sum().clamp_min(1.0)
    # One head at a time: all of them in float64 are gigabytes at the longest length.
    return torch.stack(
        [
            _slope(head, bias.double().where(seen, 0.0), seen, distance, squares, epsilon)
            for head, bias in enumerate(base)
        ]
    )


def _slope(
    head: int, bias: torch.Tensor, seen: torch.Tensor, distance: torch.Tensor,
    squares: torch.Tensor, epsilon: float,
) -> torch.Tensor:  # fmt: skip
    """bias, distance [T, T] float64, zero where not seen -> the slope, a scalar."""
    added = (bias - bias.diagonal()[:, None]).where(seen, 0.0)
    slope = (added * distance).sum() / squares
    error = float((added - slope * distance).abs().max())
    if error > 4 * epsilon * float(bias.abs().max()) + 1e-6:
        last = ", ".join(f"{number:.4g}" for number in added[-1, -4:].tolist())
        raise CaptureError(
            "its bias is no function the attention op expresses: for head "
            f"{head} it is [{last}] over the last keys of the last query, off the nearest linear "
            f"one by {error:.2g}"
        )
    return slope


def _close(a: torch.Tensor, b: torch.Tensor, epsilon: float) -> bool:
    return bool(((a - b).abs() <= 1e-6 + 8 * epsilon * b.abs()).all())


def _scaling(length: int, function: Function, heads: int, epsilon: float) -> tuple[float, float]:
    """Scale and soft-cap (0.0 for none) of f.

    Raises:
        CaptureError: neither explains what f does to random scores.
    """
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(heads, length, length, generator=generator) * 4
    base = function(torch.zeros_like(scores))
    seen = _visible(base).expand_as(base)

    def change(given: torch.Tensor) -> torch.Tensor:
        return (function(given) - base)[seen].double()

    given, found = scores[seen].double(), change(scores)
    rounding = 4 * epsilon * float(base[seen].abs().max())
    allowed = (1e-5 + 4 * epsilon) * float(found.abs().max()) + rounding
    scale = float((given * found).sum() / given.square().sum())
    if float((found - scale * given).abs().max()) <= allowed:
        return scale, 0.0
    softcap = float(change(torch.full_like(scores, 1e6)).abs().max())
    if 0.0 < softcap < 1e4:
        small = scores / 16
        bent = (change(small) / softcap).clamp(-0.999, 0.999).atanh() * softcap
        scale = float((small[seen].double() * bent).sum() / small[seen].double().square().sum())
        capped = softcap * torch.tanh(scale * given / softcap)
        if float((found - capped).abs().max()) <= 10 * allowed:
            return scale, softcap
    raise CaptureError(
        "what it does to its scores is no scale and no soft-cap: "
        f"{float(given[0]):.4g} becomes {float(found[0]):.4g}, and {float(given[-1]):.4g} becomes "
        f"{float(found[-1]):.4g}"
    )
