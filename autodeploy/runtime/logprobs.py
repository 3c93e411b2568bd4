"""Log probabilities of tokens as the model gave them, with ranks.

They are those of the raw distribution: log_softmax of the logits before penalties, masks,
temperature or truncation. Equally likely tokens share a rank, 1 + the number more likely.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .messages import TokenLogprob

CHUNK_BYTES = 2**22
"""float32 log probabilities handled at once: bounds the copies of a long prompt's logits."""


def token_logprobs(
    logits: Tensor, token_ids: Sequence[int], counts: Sequence[int]
) -> list[list[TokenLogprob]]:
    """For each row its token first, then the `counts[i]` most likely tokens, best first.

    logits [M, V] of any float type; the token appears twice if it is among the most likely.
    A count above V gives V.
    """
    found: list[list[TokenLogprob]] = []
    step = max(1, CHUNK_BYTES // (4 * logits.shape[1]))
    for start in range(0, len(token_ids), step):
        rows = slice(start, start + step)
        found += _of_rows(logits[rows], list(token_ids[rows]), list(counts[rows]))
    return found


def _of_rows(logits: Tensor, token_ids: list[int], counts: list[int]) -> list[list[TokenLogprob]]:
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])
    ahead = (logprobs > chosen).count_nonzero(dim=-1)
    firsts = map(TokenLogprob, token_ids, chosen[:, 0].tolist(), (ahead + 1).tolist())
    result = [[first] for first in firsts]
    width = min(max(counts), logprobs.shape[1])
    if width == 0:
        return result
    best = logprobs.topk(width, dim=-1)
    values = best.values.cpu().numpy()
    ranks = _ranks(values).tolist()
    top_ids, top_logprobs = best.indices.tolist(), values.tolist()
    for row, count in enumerate(counts):
        entries = zip(top_ids[row][:count], top_logprobs[row], ranks[row], strict=False)
        result[row].extend(TokenLogprob(*entry) for entry in entries)
    return result


def _ranks(descending: np.ndarray) -> np.ndarray:
    """1 + the number of larger entries of the row, [M, K] descending along K."""
    places = np.broadcast_to(np.arange(descending.shape[1]), descending.shape)
    tied = np.zeros(descending.shape, dtype=bool)
    tied[:, 1:] = descending[:, 1:] == descending[:, :-1]
    return np.maximum.accumulate(np.where(tied, 0, places), axis=1) + 1
