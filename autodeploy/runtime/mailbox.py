"""Mailbox: what the host and captured decoding steps tell each other, without a copy.

Both sides are pinned memory, which the device reads and writes by itself, as part of the graph: a
step is one launch. A copy before it and one after would each take some 5 us of the device's time,
most of it to get going. There are several letters and answers, used in turn: a step that runs is
not disturbed by the next one being prepared. The device counts the turns too.
"""

from __future__ import annotations

import numpy as np
import torch

from autodeploy.custom_ops.step import FIELDS

from .sampling import Sampling, best_result
from .staging import RING


class Mailbox:
    """Letters to decoding steps of up to `most` sequences, and their answers.

    groups: cache groups, for each of which a letter names the pages of the new tokens.
    """

    def __init__(self, groups: int, most: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.letters = torch.zeros(
            (RING, len(FIELDS) + groups, most), dtype=torch.int32, pin_memory=cuda
        )
        """As `open_step` takes them."""
        self.answers = torch.zeros((RING, most), dtype=torch.int64, pin_memory=cuda)
        """The most likely token of each sequence, -1 where there is none."""
        self.turn = torch.zeros(1, dtype=torch.int64, device=device)
        """On the device: the letter opened last."""
        self._letters = self.letters.numpy()
        self._answers = self.answers.numpy()
        self._events = [torch.cuda.Event() for _ in range(RING)] if cuda else []
        self._answered = [True] * RING
        self._at = 0

    def start(self) -> None:
        """Steps have run that had no letter of their own: counts from the start again."""
        self._at = 0
        self.turn.zero_()

    def next(self) -> tuple[int, np.ndarray]:
        """A letter's number, and [fields, most] int32 to be filled; then the step must be launched.

        The letter says what it was filled with last.
        """
        self._at = at = (self._at + 1) % RING
        if self._events and not self._answered[at]:
            # Over long ago: there are more letters than steps under way.
            self._events[at].synchronize()
        return at, self._letters[at]

    def launched(self) -> None:
        """The step that reads the letter filled last is on its way, on the current stream."""
        self._answered[self._at] = False
        if self._events:
            self._events[self._at].record()

    def answer(self, rows: np.ndarray) -> Sampling:
        """What the step launched last answers, to be read before the next but one is launched.

        rows [N] int64 as in `SampleResult`.
        """
        at = self._at
        answers = self._answers[at, : len(rows)]

        def wait() -> None:
            self._events[at].synchronize()
            self._answered[at] = True

        return Sampling(
            None, lambda: best_result(answers.copy(), rows.copy()), wait if self._events else None
        )
