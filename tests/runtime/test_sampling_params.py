"""SamplingParams refuses what makes no sense, with a sentence, and carries the rest unchanged."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autodeploy.errors import InvalidRequestError, SamplingParamsError
from autodeploy.runtime.sampling_params import SamplingParams

BAD_VALUES = [
    ("n", 0, "n=0"),
    ("n", -3, "at least one"),
    ("n", 10**9, "16384"),
    ("n", True, "bool"),
    ("n", 1.0, "integer"),
    ("n", None, "integer"),
    ("temperature", -0.1, "at least 0"),
    ("temperature", math.nan, "finite"),
    ("temperature", math.inf, "finite"),
    ("temperature", 10**400, "finite"),
    ("temperature", "hot", "number"),
    ("temperature", False, "bool"),
    ("temperature", None, "number"),
    ("top_k", -2, "0 or -1"),
    ("top_k", 2.5, "integer"),
    ("top_p", 0.0, "temperature=0"),
    ("top_p", 1.01, "[0, 1]"),
    ("top_p", math.nan, "finite"),
    ("min_p", -0.5, "[0, 1]"),
    ("min_p", 1.5, "[0, 1]"),
    ("repetition_penalty", 0.0, "use 1"),
    ("repetition_penalty", -1.0, "use 1"),
    ("repetition_penalty", math.nan, "finite"),
    ("presence_penalty", 2.1, "[-2, 2]"),
    ("frequency_penalty", -math.inf, "finite"),
    ("logit_bias", {1: math.nan}, "logit_bias[1]"),
    ("logit_bias", {1: 101}, "bad_words"),
    ("logit_bias", {-1: 1.0}, "token id"),
    ("logit_bias", {"1": 1.0}, "integer"),
    ("logit_bias", [1], "dict"),
    ("bad_words", [""], "empty string"),
    ("bad_words", "word", "list"),
    ("bad_words", [3], "string"),
    ("bad_words_token_ids", [[]], "empty sequence"),
    ("bad_words_token_ids", [1], "list"),
    ("bad_words_token_ids", [[-1]], "token id"),
    ("allowed_token_ids", [], "at least one"),
    ("allowed_token_ids", [1.5], "integer"),
    ("seed", 2**64, "64-bit"),
    ("seed", 0.5, "integer"),
    ("logprobs", -1, "None"),
    ("logprobs", True, "bool"),
    ("prompt_logprobs", -1, "None"),
    ("stop", "", "empty string"),
    ("stop", ["ok", ""], "empty string"),
    ("stop", 3, "list"),
    ("stop_token_ids", [-1], "token id"),
    ("stop_token_ids", [True], "bool"),
    ("min_tokens", -1, "no minimum"),
    ("min_tokens", 17, "max_tokens=16"),
    ("max_tokens", 0, "at least one"),
    ("max_tokens", 10**500, "bits"),
    ("ignore_eos", 1, "True or False"),
    ("detokenize", "yes", "True or False"),
    ("skip_special_tokens", None, "True or False"),
]

CONTRADICTIONS = [
    ({"n": 2, "temperature": 0}, "n=1"),
    ({"min_tokens": 5, "max_tokens": 4}, "raise max_tokens"),
    ({"stop": "x", "detokenize": False}, "stop_token_ids"),
    ({"allowed_token_ids": [3, 4], "bad_words_token_ids": [[4]]}, "token 4"),
    ({"allowed_token_ids": [3], "stop_token_ids": [3], "min_tokens": 1}, "min_tokens=0"),
]


@pytest.mark.parametrize(("name", "value", "says"), BAD_VALUES)
def test_a_bad_value_is_refused_with_its_name_and_a_remedy(name, value, says):
    with pytest.raises(SamplingParamsError) as refusal:
        SamplingParams(**{name: value})
    assert name in str(refusal.value)
    assert says in str(refusal.value)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(("values", "says"), CONTRADICTIONS)
def test_values_that_contradict_each_other_are_refused(values, says):
    with pytest.raises(SamplingParamsError, match=says):
        SamplingParams(**values)
    for name in values:
        SamplingParams(**{k: v for k, v in values.items() if k != name} | {"max_tokens": None})


def test_an_unknown_keyword_is_refused():
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)


def test_the_refusal_is_one_of_an_invalid_request():
    with pytest.raises(InvalidRequestError):
        SamplingParams(n=0)


def test_minus_one_and_zero_both_mean_all_tokens():
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0) == SamplingParams()


def test_stop_becomes_a_list():
    assert SamplingParams().stop == []
    assert SamplingParams(stop="end").stop == ["end"]
    assert SamplingParams(stop=("a", "b")).stop_strings == ["a", "b"]


def test_numpy_numbers_become_plain_ones_that_cross_a_socket():
    params = SamplingParams(
        max_tokens=np.int64(4), temperature=np.float32(0.5), stop_token_ids=[np.int32(2)]
    )
    assert type(params.max_tokens) is int
    assert type(params.temperature) is float
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_the_callers_lists_are_not_kept():
    stop, allowed = ["a"], [1, 2]
    params = SamplingParams(stop=stop, allowed_token_ids=allowed)
    stop.append("")
    allowed.clear()
    assert params.stop == ["a"]
    assert params.allowed_token_ids == [1, 2]


def test_a_clone_is_independent_and_checked():
    params = SamplingParams(stop=["a"], logit_bias={1: 2.0})
    copy = params.clone(n=3)
    copy.stop_strings.append("b")
    assert (copy.n, params.n, params.stop) == (3, 1, ["a"])
    assert params.clone() == params
    with pytest.raises(SamplingParamsError):
        params.clone(temperature=math.nan)


def test_a_field_assigned_later_is_checked_by_validate():
    params = SamplingParams()
    params.top_p = math.nan
    with pytest.raises(SamplingParamsError, match="top_p"):
        params.validate()


def test_a_bad_value_from_the_wire_is_refused():
    with pytest.raises(msgspec.ValidationError, match="temperature"):
        msgspec.json.decode(b'{"temperature": -1}', type=SamplingParams)


ids = st.integers(0, 2**31 - 1)
sensible = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0.01, 10) | st.integers(1, 5),
        "n": st.integers(1, 16384),
        "top_k": st.integers(-1, 2**31 - 1),
        "top_p": st.floats(0, 1, exclude_min=True),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(1e-3, 1e3),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "logit_bias": st.none() | st.dictionaries(ids, st.floats(-100, 100), max_size=5),
        "bad_words": st.none() | st.lists(st.text(min_size=1), max_size=3),
        "bad_words_token_ids": st.none() | st.lists(st.lists(ids, min_size=2), max_size=3),
        "seed": st.none() | st.integers(-(2**63), 2**64 - 1),
        "logprobs": st.none() | st.integers(0, 20),
        "stop": st.none() | st.text(min_size=1) | st.lists(st.text(min_size=1), max_size=3),
        "stop_token_ids": st.none() | st.lists(ids, max_size=3),
        "ignore_eos": st.booleans(),
        "min_tokens": st.integers(0, 16),
        "max_tokens": st.none() | st.integers(16, 10**6),
    },
)
junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers() | st.floats() | st.text(max_size=2) | st.none(), max_size=3),
    st.lists(st.lists(st.integers(), max_size=2), max_size=2),
    st.dictionaries(st.integers() | st.text(max_size=2), st.floats() | st.none(), max_size=2),
)


@settings(max_examples=150, deadline=None)
@given(sensible)
def test_sensible_values_survive_a_round_trip_and_a_second_check(values):
    params = SamplingParams(**values)
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    assert decoded == params == params.clone()
    params.validate()
    assert decoded == params


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(SamplingParams.__struct_fields__), junk, max_size=4))
def test_any_values_are_either_refused_properly_or_usable(values):
    try:
        params = SamplingParams(**values)
    except SamplingParamsError:
        return
    msgspec.msgpack.encode(params)
    assert math.isfinite(params.temperature)
    assert params.temperature >= 0
    assert params.n >= 1
    assert 0 < params.top_p <= 1
    assert isinstance(params.stop, list)
    assert params.top_k >= 0
