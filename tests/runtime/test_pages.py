from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from toy_runner import contract_of

from autodeploy.runtime.pages import (
    NULL_PAGE,
    BlockTables,
    PagePool,
    SlotPool,
    page_hash,
    pages_needed,
    root_hash,
)


def hashes_of(tokens, page_size=4, salt=None):
    hashes, parent = [], root_hash(salt)
    for end in range(page_size, len(tokens) + 1, page_size):
        parent = page_hash(parent, np.array(tokens[end - page_size : end]))
        hashes.append(parent)
    return hashes


def tables_of(*groups, num_pages=12, page_size=4, num_slots=3, max_model_len=40):
    contract = contract_of(*groups)
    pages = {group.name: num_pages for group in contract.token_groups}
    return BlockTables(contract.token_groups, pages, page_size, num_slots, max_model_len)


def cached(tables, slot, tokens):
    """Computes a whole sequence in a slot and gives its pages back."""
    hashes = hashes_of(tokens)
    tables.grow(slot, len(tokens))
    tables.publish(slot, hashes, 0, len(hashes))
    tables.slide(slot, len(tokens))
    tables.clear(slot)


class PoolMachine(RuleBasedStateMachine):
    """A pool against the plainest model of it: who holds what, and what is known."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(7, 4)
        self.held = []
        self.names = {}
        self.idle = []

    @rule()
    def take(self):
        if not self.pool.available:
            with pytest.raises(IndexError):
                self.pool.take()
            return
        free = 6 - len(set(self.held)) - len(self.idle)
        page = self.pool.take()
        assert page not in self.held
        assert page != NULL_PAGE
        if free:
            assert page not in self.idle
        else:
            assert page == self.idle.pop(0), "the least recently used goes first"
            del self.names[page]
        self.held.append(page)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        page = data.draw(st.sampled_from(self.held))
        self.held.remove(page)
        self.pool.release(page)
        if page not in self.held and page in self.names:
            self.idle.append(page)

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def share(self, data):
        page = data.draw(st.sampled_from(sorted(self.names)))
        assert self.pool.find(self.names[page]) == page
        self.pool.share(page)
        self.held.append(page)
        if page in self.idle:
            self.idle.remove(page)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), content=st.integers(0, 9))
    def publish(self, data, content):
        page = data.draw(st.sampled_from(self.held))
        name = bytes([content])
        self.pool.publish(page, name)
        if page not in self.names and name not in self.names.values():
            self.names[page] = name

    @rule(content=st.integers(0, 9))
    def forget(self, content):
        name = bytes([content])
        self.pool.forget(name)
        assert self.pool.find(name) is None
        for page in [page for page, known in self.names.items() if known == name]:
            del self.names[page]
            if page in self.idle:
                self.idle.remove(page)

    @invariant()
    def nothing_is_lost_or_owned_twice(self):
        pool = self.pool
        holders = Counter(self.held)
        assert pool._holders == [holders[page] for page in range(pool.num_pages)]
        assert list(pool._idle) == self.idle
        assert sorted([*set(self.held), *self.idle, *pool._free]) == list(range(1, 7))
        assert {page: name for name, page in pool._pages.items()} == self.names
        assert pool.used == len(holders)
        assert pool.available == 6 - pool.used


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=120, stateful_step_count=70, deadline=None)


def test_a_page_nobody_holds_cannot_be_released():
    pool = PagePool(3, 4)
    page = pool.take()
    pool.release(page)
    with pytest.raises(ValueError, match="nobody holds it"):
        pool.release(page)


def test_pages_needed_rounds_up():
    assert [pages_needed(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_slots_are_handed_out_once():
    slots = SlotPool(3)
    taken = [slots.take() for _ in range(3)]
    assert sorted(taken) == [0, 1, 2]
    with pytest.raises(IndexError):
        slots.take()
    slots.release(taken[1])
    with pytest.raises(KeyError):
        slots.release(taken[1])
    assert slots.take() == taken[1]


def test_hashes_depend_on_all_tokens_before_and_on_the_salt():
    assert hashes_of([1, 2, 3, 4, 5, 6, 7, 8])[0] == hashes_of([1, 2, 3, 4])[0]
    assert hashes_of([1, 2, 3, 4, 5, 6, 7, 8])[1] != hashes_of([0, 2, 3, 4, 5, 6, 7, 8])[1]
    roots = {root_hash(salt) for salt in (None, "", "a", "b")}
    assert len(roots) == 4


def test_a_hit_stops_at_the_first_missing_page_and_at_the_limit():
    tables = tables_of("tokens")
    tokens = list(range(16))
    cached(tables, 0, tokens)
    hashes = hashes_of(tokens)
    assert tables.match(hashes, 16) == 16
    assert tables.match(hashes, 15) == 12
    assert tables.match(hashes_of([*tokens[:8], 99, *tokens[9:]]), 16) == 8
    tables.forget(hashes[1:2])
    assert tables.match(hashes, 16) == 4


def test_a_window_needs_only_the_pages_it_can_look_at():
    tables = tables_of("window_5")
    tokens = list(range(16))
    cached(tables, 0, tokens)
    hashes = hashes_of(tokens)
    tables.forget(hashes[:2])
    # Position 16 looks back at 12 .. 15, position 12 at 8 .. 11.
    assert tables.match(hashes, 16) == 16
    assert tables.match(hashes, 12) == 12
    tables.forget(hashes[2:3])
    assert tables.match(hashes, 16) == 16
    assert tables.match(hashes, 12) == 0
    tables.attach(1, hashes, 16)
    assert np.count_nonzero(tables.tables["window_5"][1]) == 1


def test_all_groups_must_agree_on_a_hit():
    tables = tables_of("tokens", "window_5")
    tokens = list(range(16))
    cached(tables, 0, tokens)
    hashes = hashes_of(tokens)
    full, windowed = tables.pools["tokens"], tables.pools["window_5"]
    windowed.forget(hashes[3])
    assert tables.match(hashes, 16) == 12
    full.forget(hashes[2])
    assert tables.match(hashes, 16) == 8


def test_pages_before_a_window_are_given_back():
    tables = tables_of("tokens", "window_5")
    tables.grow(0, 24)
    tables.slide(0, 24)
    # Position 24 looks back at 20 .. 23, all of the sixth page.
    assert np.flatnonzero(tables.tables["window_5"][0]).tolist() == [5]
    assert tables.pools["window_5"].used == 1
    assert tables.pools["tokens"].used == 6
    tables.clear(0)
    assert tables.used == 0


def test_the_end_of_a_sequence_loses_its_content_first():
    tables = tables_of("tokens", num_pages=5)
    tokens = list(range(16))
    cached(tables, 0, tokens)
    tables.grow(1, 4)
    assert tables.match(hashes_of(tokens), 16) == 12


def test_fits_counts_idle_hits_as_taken():
    tables = tables_of("tokens", num_pages=5)
    tokens = list(range(16))
    cached(tables, 0, tokens)
    hashes = hashes_of(tokens)
    assert tables.fits(hashes, 8, 16, 7, spare=0)
    assert not tables.fits(hashes, 8, 17, 7, spare=0)
    assert not tables.fits(hashes, 8, 16, 7, spare=1)
