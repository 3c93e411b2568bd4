"""ResponseStore: responses that later requests may go on from, in memory and not for ever."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

MOST_BYTES = 64 * 2**20
"""Of all kept responses together: a body may have megabytes."""


@dataclass(frozen=True)
class Kept:
    """A response and the conversation up to its end, both as JSON."""

    owner: bytes
    response: bytes
    items: bytes

    @property
    def size(self) -> int:
        return len(self.response) + len(self.items)


def owner_of(authorization: str | None) -> bytes:
    """Who asks: what one API key keeps is not shown to another. The key itself is not kept."""
    return hashlib.sha256((authorization or "").encode()).digest()


class ResponseStore:
    """The last responses; the one longest unused goes first.

    limit: how many; 0 keeps none. most_bytes: of all together.
    """

    def __init__(self, limit: int, most_bytes: int = MOST_BYTES) -> None:
        self.limit = limit
        self._most_bytes = most_bytes
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, name: str, kept: Kept) -> None:
        """Keeps a response, unless it alone is too large."""
        if not self.limit or kept.size > self._most_bytes:
            return
        self._kept[name] = kept
        self.bytes += kept.size
        while len(self._kept) > self.limit or self.bytes > self._most_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.bytes -= oldest.size

    def get(self, name: str, owner: bytes) -> Kept | None:
        """The response of that name, if this owner has one."""
        kept = self._kept.get(name)
        if kept is None or kept.owner != owner:
            return None
        self._kept.move_to_end(name)
        return kept

    def drop(self, name: str, owner: bytes) -> bool:
        """Forgets a response; whether there was one."""
        kept = self.get(name, owner)
        if kept is None:
            return False
        del self._kept[name]
        self.bytes -= kept.size
        return True
