"""Pages: who holds which piece of the caches, and which pieces can be used again.

A pool hands out the pages of one cache group. Full pages are known by a hash of all tokens up to
their end, so a request that starts with the same tokens shares them; a page that nobody holds
but whose hash is known stays a hit until its place is needed (least recently used first).

A block table says, per running request and group, which page holds each `page_size` tokens. It
changes only where a sequence grows, slides its window or ends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from autodeploy.custom_ops.contract import CacheGroup

NULL_PAGE = 0
"""Never handed out, never written: what block tables hold where no page is needed."""


def pages_needed(tokens: int, page_size: int) -> int:
    """Pages that hold `tokens` tokens; 0 for 0."""
    return -(-tokens // page_size)


def root_hash(cache_salt: str | None, length: int = 1) -> bytes:
    """The parent of a sequence's first page; different salts share nothing.

    length: what tells keys apart whose tokens and positions are equal (`LengthRule.alike`).
    """
    salt = b"" if cache_salt is None else b"salt " + cache_salt.encode()
    if length != 1:
        salt = b"length %d " % length + salt
    return hashlib.blake2b(salt, digest_size=16).digest()


def page_hash(parent: bytes, token_ids: np.ndarray) -> bytes:
    """Names one full page: its int64 tokens and, through `parent`, all before them."""
    return hashlib.blake2b(parent + token_ids.tobytes(), digest_size=16).digest()


class PagePool:
    """Pages 1 .. num_pages - 1 of one cache group.

    Every page is in exactly one state: held (its count of holders is above 0), idle (nobody
    holds it, its content is known by hash) or free.
    """

    def __init__(self, num_pages: int, page_size: int, window: int = 0) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.window = window
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))
        self._idle: dict[int, None] = {}
        self._holders = [0] * num_pages
        self._hashes: list[bytes | None] = [None] * num_pages
        self._pages: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Pages that `take` can still give."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages held by someone."""
        return self.num_pages - 1 - self.available

    def find(self, hash: bytes) -> int | None:
        """The page with this content, or None."""
        return self._pages.get(hash)

    def is_idle(self, page: int) -> bool:
        return page in self._idle

    def first_column(self, position: int) -> int:
        """The first column of a block table that queries from `position` on can read."""
        return max(0, position - self.window + 1) // self.page_size if self.window else 0

    def take(self) -> int:
        """A page of unknown content, held once; the least recently used idle one if none is free.

        Raises:
            IndexError: none is available.
        """
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page = next(iter(self._idle))
            del self._idle[page]
            self._unname(page)
        else:
            raise IndexError("no page is available; look at `available` first")
        self._holders[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more holder of a held or idle page."""
        self._idle.pop(page, None)
        self._holders[page] += 1

    def release(self, page: int) -> None:
        """One holder less; without any, the page is idle if its content is known, else free.

        Raises:
            ValueError: nobody holds it.
        """
        if self._holders[page] <= 0:
            raise ValueError(f"page {page} is released but nobody holds it")
        self._holders[page] -= 1
        if self._holders[page] == 0:
            if self._hashes[page] is None:
                self._free.append(page)
            else:
                self._idle[page] = None

    def publish(self, page: int, hash: bytes) -> None:
        """Makes a full, computed page a hit; of two pages with one content the first stays it."""
        if hash not in self._pages and self._hashes[page] is None:
            self._pages[hash] = page
            self._hashes[page] = hash

    def forget(self, hash: bytes) -> None:
        """No request shall share the page of this content any more."""
        page = self._pages.get(hash)
        if page is not None:
            self._unname(page)
            if page in self._idle:
                del self._idle[page]
                self._free.append(page)

    def _unname(self, page: int) -> None:
        hash = self._hashes[page]
        if hash is not None:
            del self._pages[hash]
            self._hashes[page] = None


class SlotPool:
    """Numbers 0 .. num_slots - 1, one per running request: its row in tables and state caches."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots - 1, -1, -1))
        self._taken: set[int] = set()

    @property
    def available(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A slot nobody has; IndexError if there is none."""
        slot = self._free.pop()
        self._taken.add(slot)
        return slot

    def release(self, slot: int) -> None:
        """Gives a slot back; KeyError if nobody has it."""
        self._taken.remove(slot)
        self._free.append(slot)


class BlockTables:
    """The pages of every running request in every per-token cache group.

    All groups have one page size, so a slot has the same number of columns in each; what lies
    wholly before a group's window is `NULL_PAGE`.
    """

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        num_pages: Mapping[str, int],
        page_size: int,
        num_slots: int,
        max_model_len: int,
    ) -> None:
        self.page_size = page_size
        width = pages_needed(max_model_len, page_size)
        self.pools = {g.name: PagePool(num_pages[g.name], page_size, g.window) for g in groups}
        self.tables = {g.name: np.zeros((num_slots, width), dtype=np.int32) for g in groups}
        self._pairs = [(self.pools[g.name], self.tables[g.name]) for g in groups]
        self._windowed = [at for at, g in enumerate(groups) if g.window]
        self.changes: dict[str, dict[int, int]] | None = None
        """Entries set since somebody emptied it: slot * width + column -> page, by group; None:
        nobody keeps a copy of the tables. Entries that nothing reads any more are not told."""
        self._names = [g.name for g in groups]
        self._columns = [0] * num_slots
        self._first = [[0] * num_slots for _ in groups]

    def columns(self, slot: int) -> int:
        """Columns of the slot in use, those before a window included."""
        return self._columns[slot]

    def match(self, hashes: Sequence[bytes], limit: int) -> int:
        """Tokens, at most `limit`, of the longest prefix that all groups have in their pages.

        A group with a window needs only the pages that the next token can look at.
        """
        best = 0
        runs = [0] * len(self._pairs)
        for column in range(min(len(hashes), limit // self.page_size) if runs else 0):
            end = (column + 1) * self.page_size
            complete = True
            for at, (pool, _) in enumerate(self._pairs):
                runs[at] = runs[at] + 1 if pool.find(hashes[column]) is not None else 0
                if runs[at] < column + 1 - pool.first_column(end):
                    complete = False
                    if not pool.window:
                        return best
            if complete:
                best = end
        return best

    def fits(
        self, hashes: Sequence[bytes], cached: int, tokens: int, chunk: int, spare: int
    ) -> bool:
        """Whether a new sequence of `tokens` tokens, computed by `chunk`, gets all its pages now.

        `cached` of its tokens come from pages named by `hashes`; `spare` pages must be left.
        """
        first_new = cached // self.page_size
        for pool, _ in self._pairs:
            wanted = pages_needed(tokens, self.page_size) - first_new
            if pool.window:
                wanted = min(wanted, pages_needed(pool.window + chunk, self.page_size) + 1)
            hits = map(pool.find, hashes[pool.first_column(cached) : first_new])
            kept = sum(page is not None and pool.is_idle(page) for page in hits)
            if pool.available - kept < wanted + spare:
                return False
        return True

    def attach(self, slot: int, hashes: Sequence[bytes], cached: int) -> None:
        """Starts an empty slot with the pages of a prefix that `match` found."""
        columns = cached // self.page_size
        self._columns[slot] = columns
        for at, (pool, _) in enumerate(self._pairs):
            first = self._first[at][slot] = pool.first_column(cached)
            for column in range(first, columns):
                page = pool.find(hashes[column])
                assert page is not None, "match() and attach() disagree"
                pool.share(page)
                self._set(at, slot, column, page)

    def slide(self, slot: int, position: int) -> None:
        """Gives back pages wholly before the window of queries from `position` on."""
        for at in self._windowed:
            pool, table = self._pairs[at]
            first = min(pool.first_column(position), self._columns[slot])
            for column in range(self._first[at][slot], first):
                pool.release(int(table[slot, column]))
                table[slot, column] = NULL_PAGE
            if first > self._first[at][slot]:
                self._first[at][slot] = first

    def room(self, slot: int, tokens: int) -> int:
        """How many tokens, up to `tokens`, the slot can hold with the pages available now."""
        columns = self._columns[slot]
        if tokens <= columns * self.page_size:
            return tokens
        available = min((pool.available for pool, _ in self._pairs), default=tokens)
        return min(tokens, (columns + available) * self.page_size)

    def grow(self, slot: int, tokens: int) -> None:
        """Adds the pages that `tokens` tokens need; ask `room` first."""
        columns = pages_needed(tokens, self.page_size)
        if columns > self._columns[slot]:
            for at, (pool, _) in enumerate(self._pairs):
                for column in range(self._columns[slot], columns):
                    self._set(at, slot, column, pool.take())
            self._columns[slot] = columns

    def grow_by_one(self, slots: Sequence[int]) -> bool:
        """One more column for each of these slots; False, and nothing done, if pages are short."""
        if any(pool.available < len(slots) for pool, _ in self._pairs):
            return False
        if not slots:
            return True
        columns = [self._columns[slot] for slot in slots]
        for name, (pool, table) in zip(self._names, self._pairs, strict=True):
            pages = [pool.take() for _ in slots]
            table[slots, columns] = pages
            if self.changes is not None:
                width = table.shape[1]
                for slot, column, page in zip(slots, columns, pages, strict=True):
                    self.changes[name][slot * width + column] = page
        for slot in slots:
            self._columns[slot] += 1
        return True

    @property
    def windows(self) -> list[int]:
        """Of the groups that have one."""
        return [self._pairs[at][0].window for at in self._windowed]

    def _set(self, at: int, slot: int, column: int, page: int) -> None:
        table = self._pairs[at][1]
        table[slot, column] = page
        if self.changes is not None:
            self.changes[self._names[at]][slot * table.shape[1] + column] = page

    def publish(self, slot: int, hashes: Sequence[bytes], first: int, end: int) -> None:
        """Makes the computed columns first .. end - 1 of the slot hits for others."""
        for at, (pool, table) in enumerate(self._pairs):
            for column in range(max(first, self._first[at][slot]), end):
                pool.publish(int(table[slot, column]), hashes[column])

    def clear(self, slot: int) -> None:
        """Gives all pages of the slot back; the ends of sequences lose their content first."""
        for at, (pool, table) in enumerate(self._pairs):
            held = slice(self._first[at][slot], self._columns[slot])
            for page in reversed(table[slot, held].tolist()):
                pool.release(page)
            table[slot, held] = NULL_PAGE
            self._first[at][slot] = 0
        self._columns[slot] = 0

    def forget(self, hashes: Sequence[bytes]) -> None:
        """Takes contents out of reach of other requests, in all groups."""
        for pool, _ in self._pairs:
            for hash in hashes:
                pool.forget(hash)

    @property
    def used(self) -> int:
        return sum(pool.used for pool, _ in self._pairs)

    @property
    def total(self) -> int:
        return sum(pool.num_pages - 1 for pool, _ in self._pairs)
