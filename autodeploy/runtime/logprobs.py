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
    A count above V gives V. Waits for the device.
    """
    found: list[list[TokenLogprob]] = []
    step = max(1, CHUNK_BYTES // (4 * logits.shape[1]))
    for start in range(0, len(token_ids), step):
        rows = slice(start, start + step)
        ids, asked = list(token_ids[rows]), list(counts[rows])
        width = min(max(asked), logits.shape[1])
        table = logprob_table(logits[rows], torch.tensor(ids, device=logits.device), width)
        found += read_logprobs(table.cpu().numpy(), ids, asked)
    return found


def logprob_table(logits: Tensor, token_ids: Tensor, width: int) -> Tensor:
    """What `read_logprobs` reads, in one piece: [M, 2 + 2 * width] int32 on the same device.

    logits [M, V], token_ids [M] int64. The columns are: the token's log probability (the bits of
    a float32), its rank, the ids of the `width` most likely tokens, their log probabilities.
    Nothing here waits for the device.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None])
    rank = (logprobs > chosen).sum(dim=-1, keepdim=True, dtype=torch.int32) + 1
    if width == 0:
        return torch.cat([chosen.view(torch.int32), rank], dim=1)
    best = logprobs.topk(width, dim=-1)
    ids, values = best.indices.int(), best.values.contiguous().view(torch.int32)
    return torch.cat([chosen.view(torch.int32), rank, ids, values], dim=1)


def read_logprobs(
    table: np.ndarray, token_ids: list[int], counts: list[int]
) -> list[list[TokenLogprob]]:
    """The entries of `token_logprobs` from a table of `logprob_table`, on the host."""
    width = (table.shape[1] - 2) // 2
    chosen = table[:, :1].copy().view(np.float32)[:, 0]
    result = [
        [first] for first in map(TokenLogprob, token_ids, chosen.tolist(), table[:, 1].tolist())
    ]
    if width == 0:
        return result
    values = table[:, 2 + width :].copy().view(np.float32)
    ranks = _ranks(values).tolist()
    top_ids, top_logprobs = table[:, 2 : 2 + width].tolist(), values.tolist()
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
