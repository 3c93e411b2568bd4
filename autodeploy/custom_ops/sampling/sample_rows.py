"""sample_rows: one token per row, drawn after temperature, top-k, top-p and min-p."""

from __future__ import annotations

import torch

from ..op import register_op


@register_op(
    "sample_rows(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, "
    "Tensor number, Tensor(a!) tokens) -> ()",
    capturable=True,
)
def sample_rows(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    number: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    """Overwrites tokens [S] int64 in the rows whose temperature is above 0.

    logits [S, V] of any float type; temperature [S] float32; top_k [S] int32, kept are all tokens
    as likely as the k-th, 0 or at least V keeps all; top_p [S] float64, of equally likely tokens
    at the edge of the nucleus the lowest ids stay; min_p [S] float32, of the likeliest token's
    probability; number [S] float64 of [0, 1): where the cumulative distribution of what is left,
    in id order, is inverted. A row with NaN, +inf or nothing above -inf gets -1.
    """
    logits = logits.float()
    vocab = logits.shape[1]
    best = logits.amax(-1, keepdim=True)
    weights = ((logits - best) / temperature.clamp(min=1e-30)[:, None]).exp()
    ranked, order = weights.sort(descending=True, stable=True)
    limited = (top_k > 0) & (top_k < vocab)
    kth = ranked.gather(1, (top_k.long().clamp(1, vocab) - 1)[:, None])
    kept = (ranked >= kth) | ~limited[:, None]
    mass = torch.where(kept, ranked, 0.0).double()
    needed = mass.sum(-1, keepdim=True) * top_p[:, None]
    kept &= (mass.cumsum(-1) - mass < needed) | (top_p >= 1.0)[:, None]
    kept[:, 0] = True
    kept &= ranked >= min_p[:, None]
    left = torch.zeros_like(mass).scatter(1, order, torch.where(kept, ranked, 0.0).double())
    cumulative = left.cumsum(-1)
    place = (cumulative <= number[:, None] * cumulative[:, -1:]).sum(-1)
    # Where rounding left the target at the last sum: the last token that added any.
    drawn = torch.minimum(place, cumulative.argmax(-1))
    drawn = torch.where(best[:, 0].isfinite(), drawn, -1)
    tokens.copy_(torch.where(temperature > 0, drawn, tokens))


@sample_rows.fake
def _(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    number: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    return None
