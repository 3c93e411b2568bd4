"""Text comes out piece by piece, never half a character, never part of a stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizers import byte_level, metaspace

from autodeploy.detokenizer import Detokenizer, piece_decoder

TOKENIZERS = {"byte level": byte_level(), "metaspace": metaspace()}


def pieces_of(detokenizer, batches):
    shown = []
    for batch in batches:
        before = len(detokenizer.text)
        detokenizer.append(batch)
        shown.append(detokenizer.text[before:])
        if detokenizer.stop_reason:
            break
    before = len(detokenizer.text)
    shown.append(detokenizer.finish()[before:])
    return shown


def split(ids, cuts):
    bounds = sorted({0, len(ids), *(c % (len(ids) + 1) for c in cuts)})
    return [ids[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40), cuts=st.lists(st.integers(0, 200), max_size=20))
def test_pieces_join_to_the_whole_text_and_are_whole_characters(kind, text, cuts):
    tokenizer = TOKENIZERS[kind]
    prompt = tokenizer("the quick", add_special_tokens=False)["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]
    shown = pieces_of(Detokenizer(tokenizer, prompt), split(ids, cuts))
    assert "".join(shown) == whole
    if "�" not in whole:
        assert all("�" not in piece for piece in shown)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(
    prompt=st.text(max_size=12), text=st.text(min_size=1, max_size=30),
    cuts=st.lists(st.integers(0, 200), max_size=20),
    places=st.lists(st.tuples(st.integers(0, 29), st.integers(1, 5)), min_size=1, max_size=3),
)  # fmt: skip
def test_stop_strings_cut_any_text_where_the_first_is_complete(kind, prompt, text, cuts, places):
    tokenizer = TOKENIZERS[kind]
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :]
    stops = [s for at, size in places if (s := whole[at : at + size]) and "�" not in s]
    detokenizer = Detokenizer(tokenizer, before, stop=stops)
    shown = "".join(pieces_of(detokenizer, split(ids, cuts)))
    found = sorted((whole.index(s) + len(s), whole.index(s), s) for s in stops)
    if found:
        assert (shown, detokenizer.stop_reason) == (whole[: found[0][1]], found[0][2])
    else:
        assert (shown, detokenizer.stop_reason) == (whole, None)


@pytest.mark.parametrize("skip", [True, False])
@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 299), max_size=31))
def test_tokens_that_make_no_text_or_half_characters_lose_nothing(skip, ids):
    # Byte fallback turns valid bytes next to broken ones into � when seen together, not when
    # they come one by one; bytes of a byte-level vocabulary never do.
    tokenizer = TOKENIZERS["byte level"]
    detokenizer = Detokenizer(tokenizer, [], skip_special_tokens=skip)
    shown = "".join(pieces_of(detokenizer, [[i] for i in ids]))
    assert shown == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_character_of_many_tokens_comes_at_once():
    tokenizer = byte_level(vocab_size=259)  # bytes only
    ids = tokenizer("a🎉b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 6
    shown = pieces_of(Detokenizer(tokenizer, []), [[i] for i in ids])
    assert shown == ["a", "", "", "", "🎉", "b", ""]


def test_special_tokens_are_left_out_or_kept():
    tokenizer = byte_level()
    ids = [*tokenizer("fox", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert "".join(pieces_of(Detokenizer(tokenizer, []), [ids])) == "fox"
    kept = Detokenizer(tokenizer, [], skip_special_tokens=False)
    assert "".join(pieces_of(kept, [ids])) == "fox<eos>"


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stop", ["x j", "größ", "🎉", "fox"])
def test_a_stop_string_across_tokens_ends_the_text_and_is_never_shown_in_part(stop, include):
    tokenizer = byte_level(vocab_size=259)
    text = "the fox jumps größer 🎉 on"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer, [], stop=[stop], include_stop=include)
    kept, expected = 0, text[: text.index(stop)]
    for token in ids:
        kept += detokenizer.append([token])
        if detokenizer.stop_reason:
            break
        assert expected.startswith(detokenizer.text)
    assert detokenizer.stop_reason == stop
    assert detokenizer.finish() == expected + (stop if include else "")
    # Tokens up to the one that completed the stop string.
    assert tokenizer.decode(ids[:kept]).endswith(stop)


def test_text_that_only_began_like_a_stop_string_comes_out():
    tokenizer = byte_level(vocab_size=259)
    ids = tokenizer("abcabd", add_special_tokens=False)["input_ids"]
    shown = pieces_of(Detokenizer(tokenizer, [], stop=["abx", "abde"]), [[i] for i in ids])
    assert shown == ["", "", "abc", "", "", "", "abd"]


def test_the_first_of_several_stop_strings_wins_and_later_tokens_do_not_count():
    tokenizer = byte_level(vocab_size=259)
    ids = tokenizer("one two three", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer, [], stop=["three", "two"])
    assert detokenizer.append(ids) == len("one two")
    assert (detokenizer.stop_reason, detokenizer.finish()) == ("two", "one ")


def test_before_min_tokens_a_stop_string_is_text():
    tokenizer = byte_level(vocab_size=259)
    ids = tokenizer("a.b.c", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer, [], stop=["."], min_tokens=2)
    detokenizer.append(ids)
    assert detokenizer.finish() == "a.b"


def test_without_a_tokenizer_there_is_no_text():
    detokenizer = Detokenizer(None, [1, 2])
    assert detokenizer.append([3, 4]) == 2
    assert detokenizer.finish() == ""


def test_a_tokenizer_with_a_decode_of_its_own_is_asked_through_it():
    tokenizer = byte_level()
    plain = piece_decoder(tokenizer, True)
    ids = tokenizer("a word", add_special_tokens=False)["input_ids"]
    assert plain(ids) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    class Loud(type(tokenizer)):
        def decode(self, token_ids, **options):
            return super().decode(token_ids, **options).upper()

    tokenizer.__class__ = Loud
    assert piece_decoder(tokenizer, True)(ids) == plain(ids).upper()
