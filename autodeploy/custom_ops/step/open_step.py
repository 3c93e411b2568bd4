"""open_step: the inputs of a decoding step, from the few numbers that the host left for it.

The host leaves them in memory that the device reads by itself (`runtime/mailbox.py`), a letter per
step, in turns. The first kernel of a captured step opens the next letter, so nothing is copied.
"""

from __future__ import annotations

import torch

from ..op import register_op

FIELDS = ("slot", "position", "token", "key_length")
"""First rows of a letter; a row with the page of its new token follows for each cache group."""


@register_op(
    "open_step(Tensor letters, Tensor(a!) turn, Tensor newest, int sequences) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    capturable=True,
)
def open_step(
    letters: torch.Tensor, turn: torch.Tensor, newest: torch.Tensor, sequences: int
) -> tuple[torch.Tensor, ...]:
    """The next letter, for B `sequences` that compute one token each.

    letters [turns, 4 + groups, S >= B] int32, on the device or in pinned memory; turn [1] int64,
    which goes on by one; newest [slots] int64, for tokens -1 - slot.

    Gives input_ids, position_ids and known_len [1, B] int64, kv_len [B] int32, the slots [B]
    int64, and the pages [groups, B] int32.
    """
    turn.copy_((turn + 1) % len(letters))
    letter = letters.to(turn.device, non_blocking=True).index_select(0, turn)[0, :, :sequences]
    slots, positions, ids, lengths = letter[: len(FIELDS)].long()
    ids = torch.where(ids < 0, newest[(-1 - ids).clamp(min=0)], ids)
    known = positions + 1
    return (
        ids[None], positions.clone()[None], torch.maximum(lengths, known)[None], known.int(),
        slots.clone(), letter[len(FIELDS) :].clone(),
    )  # fmt: skip


@open_step.fake
def _(
    letters: torch.Tensor, turn: torch.Tensor, newest: torch.Tensor, sequences: int
) -> tuple[torch.Tensor, ...]:
    ids, positions, known = (newest.new_empty((1, sequences)) for _ in range(3))
    lengths = newest.new_empty(sequences, dtype=torch.int32)
    pages = (letters.shape[1] - len(FIELDS), sequences)
    return (
        ids, positions, known, lengths, newest.new_empty(sequences),
        newest.new_empty(pages, dtype=torch.int32),
    )  # fmt: skip
