"""DeviceTables: the block tables' copy on the device, told only what changes.

A step of 256 decoding requests changes 16 entries, in tables that may have millions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .pages import BlockTables
from .staging import Staging


class DeviceTables:
    """[num_slots + 1, W] int32 per group; the last row is all null pages, for padding.

    Args:
        tables: the host's, whose changes are recorded from here on.
    """

    def __init__(self, tables: BlockTables, device: torch.device) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._device = device
        self._width = 0
        for name, table in tables.tables.items():
            slots, self._width = table.shape
            self.tensors[name] = torch.zeros(
                (slots + 1, self._width), dtype=torch.int32, device=device
            )
        self._changes: dict[str, dict[int, int]] = {name: {} for name in self.tensors}
        tables.changes = self._changes
        self._staging: Staging | None = None
        self._capacity = 0

    def update(self, own: int = -1) -> None:
        """Brings the copy up to date.

        own: entries of each group that the coming step sets itself; where these are all that
        changed, nothing needs to be sent.
        """
        if all(len(changes) == own for changes in self._changes.values()):
            for changes in self._changes.values():
                changes.clear()
            return
        counts = {name: len(changes) for name, changes in self._changes.items() if changes}
        if not counts:
            return
        most = max(counts.values())
        if self._staging is None or most > self._capacity:
            self._staging = self._room_for(2 * most + 256)
        arrays = self._staging.next()
        for name, count in counts.items():
            changes = self._changes[name]
            arrays[f"place_{name}"][:count] = np.fromiter(changes.keys(), np.int64, count)
            arrays[f"page_{name}"][:count] = np.fromiter(changes.values(), np.int32, count)
            changes.clear()
        self._staging.send()
        sent = self._staging.tensors
        for name, count in counts.items():
            self.tensors[name].view(-1).index_copy_(
                0, sent[f"place_{name}"][:count], sent[f"page_{name}"][:count]
            )

    def _room_for(self, entries: int) -> Staging:
        self._capacity = entries
        shapes: dict[str, tuple[tuple[int, ...], type]] = {}
        for name in self.tensors:
            shapes[f"place_{name}"] = ((entries,), np.int64)
            shapes[f"page_{name}"] = ((entries,), np.int32)
        return Staging(shapes, self._device)

    def rows(self, name: str, index: Tensor, width: int | None) -> Tensor:
        """Of a group: [B, width] int32, the first columns of the rows `index` [B] int64.

        width: None gives all columns.
        """
        return self.tensors[name][:, :width].index_select(0, index)
