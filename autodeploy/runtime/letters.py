"""LetterWriter: fills the letters of a mailbox with decoding steps, and no more than has changed.

Steps that follow each other differ in positions, and now and then in a page. A letter comes up
again every few steps, and what it still says of the same requests stands: 256 requests take one
line of it instead of five.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autodeploy.custom_ops.step import FIELDS

from .batch import FixedColumns, StepPlan, write_input_ids


@dataclass
class _Said:
    """What a letter says."""

    of: FixedColumns | None = None
    size: int = 0
    relayed: bool = False
    """Whether its tokens are named by slots."""
    turn: int = 0
    """When its pages were right."""


class LetterWriter:
    """Writes letters as `open_step` reads them.

    Args:
        tables: the block table of each cache group.
        letters: how many there are, used in turn.
        spare_slot: of sequences that are not there.
    """

    def __init__(
        self, tables: Sequence[np.ndarray], page_size: int, letters: int, spare_slot: int
    ) -> None:
        self._tables = tables
        self._page_size = page_size
        self._spare_slot = spare_slot
        self._said = [_Said() for _ in range(letters)]
        self._turn = 0
        self._moved = 0
        """The last turn in which a request had a new page."""

    def write(self, at: int, letter: np.ndarray, plan: StepPlan, size: int) -> None:
        """Fills the leading `size` columns of letter number `at` for a plan that `only_decodes`."""
        self._turn += 1
        if plan.new_pages:
            self._moved = self._turn
        used, said = len(plan), self._said[at]
        letter[1, :used] = plan.starts
        known = said.of is plan.fixed and said.size == size
        if not known:
            letter[0, :used] = plan.slots
            letter[3, :used] = plan.key_lengths
        relayed = plan.follows and plan.unresolved
        if not (known and relayed and said.relayed):
            write_input_ids(plan, letter[2])
        if not known or said.turn < self._moved:
            columns = plan.starts // self._page_size
            for line, table in enumerate(self._tables, len(FIELDS)):
                letter[line, :used] = table[plan.slots, columns]
        if not known and used < size:
            # Sequences that are not there: one token each, in the null page and the spare slot.
            letter[:, used:size] = 0
            letter[0, used:size] = self._spare_slot
        said.of, said.size, said.relayed, said.turn = plan.fixed, size, relayed, self._turn
