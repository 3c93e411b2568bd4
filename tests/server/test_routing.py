"""Which replica a prompt goes to: rules without a server."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from autodeploy.runtime.messages import EngineRequest
from autodeploy.runtime.request import RequestState
from autodeploy.runtime.sampling_params import SamplingParams
from autodeploy.server.routing import Candidate, PrefixIndex, block_hashes, choose, is_overloaded

candidates = st.lists(
    st.builds(
        Candidate, load=st.integers(0, 50_000), known=st.integers(0, 4000), step=st.just(2048),
        turn=st.integers(0, 9),
    ),
    min_size=1, max_size=8,
)  # fmt: skip


def candidate(load=0, known=0, turn=0, step=100):
    return Candidate(load, known, step, turn)


@given(candidates)
def test_a_prompt_goes_to_the_longest_prefix_or_the_least_load(everyone):
    chosen = everyone[choose(everyone)]
    least = min(c.load for c in everyone)
    most = max(c.known for c in everyone)
    assert chosen.load == least or chosen.known == most
    assert not (chosen.load > least and is_overloaded(chosen, least))


def test_the_longest_prefix_wins_and_among_equal_ones_the_least_load():
    assert choose([candidate(known=16), candidate(known=48), candidate(known=32)]) == 1
    assert choose([candidate(50, 48), candidate(20, 48), candidate(0, 32)]) == 1


def test_without_a_prefix_the_least_load_wins_and_then_whose_turn_it_is():
    assert choose([candidate(5), candidate(3), candidate(4)]) == 1
    assert choose([candidate(turn=2), candidate(turn=1), candidate(turn=3)]) == 1


def test_a_replica_is_left_when_waiting_costs_more_than_its_prefix_saves():
    other = candidate()
    assert choose([candidate(load=150, known=50), other]) == 0
    assert choose([candidate(load=151, known=50), other]) == 1
    assert choose([candidate(load=200, known=100), other]) == 0


def test_a_small_share_of_a_large_load_is_no_overload():
    assert choose([candidate(load=1400, known=16), candidate(load=1000)]) == 0
    assert choose([candidate(load=1600, known=16), candidate(load=1000)]) == 1


def test_blocks_have_the_names_that_the_engine_gives_their_pages():
    tokens = list(range(50))
    request = EngineRequest(
        request_id="r", prompt_token_ids=tokens, params=SamplingParams(), cache_salt="tenant"
    )
    pages = RequestState(request, 0, 0, 100).hash_pages(len(tokens), 16)
    assert block_hashes(tokens, 16, "tenant") == pages
    assert len(pages) == 3


def test_tenants_with_different_salts_share_no_block():
    one, other, none = (set(block_hashes(range(64), 16, salt)) for salt in ("a", "b", None))
    assert not one & other
    assert not one & none


def test_prompts_share_blocks_up_to_where_they_part():
    index = PrefixIndex(100)
    index.add(block_hashes(range(64), 16, None))
    parted = [*range(40), *range(99, 70, -1)]
    assert index.known(block_hashes(parted, 16, None)) == 2
    assert index.known(block_hashes(range(80), 16, None)) == 4
    assert index.known(block_hashes(range(15), 16, None)) == 0


def test_an_index_keeps_what_was_used_last_and_beginnings_longer_than_ends():
    index = PrefixIndex(4)
    first, second, third = ([bytes([n, at]) for at in range(2)] for n in range(3))
    index.add(first)
    index.add(second)
    index.add(first)
    index.add(third[:1])
    assert (index.known(first), index.known(second)) == (2, 1)
    index.add(third)
    assert (index.known(first), index.known(second), index.known(third)) == (2, 0, 2)


@given(st.lists(st.lists(st.binary(min_size=1, max_size=1), max_size=12), max_size=12))
def test_an_index_never_outgrows_its_capacity(prompts):
    index = PrefixIndex(5)
    for prompt in prompts:
        index.add(prompt)
        assert len(index) <= 5


def test_an_index_without_room_knows_nothing():
    index = PrefixIndex(0)
    index.add([b"a"])
    assert index.known([b"a"]) == 0


def test_hashes_do_not_depend_on_the_type_of_the_tokens():
    assert block_hashes(np.arange(32, dtype=np.int32), 16, None) == block_hashes(
        range(32), 16, None
    )
