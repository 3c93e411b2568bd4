"""What can be said of a constraint before anything is compiled."""

import msgspec
import pytest

from autodeploy.errors import SamplingParamsError
from autodeploy.runtime.sampling_params import SamplingParams
from autodeploy.runtime.structured_params import MAX_CHARACTERS, StructuredOutputsParams

DEEP: dict = {}
for _ in range(5000):
    DEEP = {"items": DEEP}
GIVEN = {
    "json": {"type": "integer"},
    "regex": "a+",
    "choice": ["yes", "no"],
    "grammar": 'start: "a"',
    "json_object": True,
}


@pytest.mark.parametrize("kind", GIVEN)
def test_each_kind_is_known_by_its_name_and_text(kind):
    params = StructuredOutputsParams(**{kind: GIVEN[kind]})
    assert params.kind == kind
    assert isinstance(params.text, str)


def test_a_schema_keeps_the_order_of_its_properties():
    schema = {"properties": {"b": {}, "a": {}}, "type": "object"}
    assert StructuredOutputsParams(json=schema).text.index('"b"') < 20
    assert StructuredOutputsParams(json='{"type":"null"}').json == '{"type":"null"}'


@pytest.mark.parametrize("fields", [{}, {"json_object": False}, {"regex": "a", "choice": ["b"]}])
def test_exactly_one_constraint_is_wanted(fields):
    with pytest.raises(SamplingParamsError, match="exactly one of"):
        StructuredOutputsParams(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"json": 3}, {"json": "[1]"}, {"json": "{"}, {"json": {"a": {1}}}, {"json": DEEP},
        {"json": {"enum": [float("nan")]}}, {"json": '{"a":' * 5000}, {"regex": ""}, {"regex": 3},
        {"choice": []}, {"choice": "ab"}, {"choice": ["a", ""]}, {"choice": [1]}, {"grammar": b"a"},
        {"grammar": ""}, {"json_object": "yes"}, {"regex": "a", "disable_any_whitespace": 1},
        {"regex": "\ud800"}, {"regex": DEEP}, {"choice": ["\udfff"]}, {"json": {"const": "\ud800"}},
    ],
)  # fmt: skip
def test_a_senseless_constraint_is_refused(fields):
    with pytest.raises(SamplingParamsError):
        StructuredOutputsParams(**fields)


@pytest.mark.parametrize("kind", ["json", "regex", "choice", "grammar"])
def test_a_constraint_too_long_to_compile_is_refused(kind):
    text = "a" * (MAX_CHARACTERS[kind] + 1)
    value = {"json": {"const": text}, "choice": [text]}.get(kind, text)
    with pytest.raises(SamplingParamsError, match="characters"):
        StructuredOutputsParams(**{kind: value})


def test_unknown_fields_are_errors():
    with pytest.raises(TypeError):
        StructuredOutputsParams(jsonn="{}")


def test_it_crosses_a_socket():
    for kind, value in GIVEN.items():
        params = SamplingParams(structured_outputs=StructuredOutputsParams(**{kind: value}))
        there = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
        assert there == params


def test_what_never_ends_is_refused():
    with pytest.raises(SamplingParamsError, match="ignore_eos"):
        SamplingParams(ignore_eos=True, structured_outputs=StructuredOutputsParams(regex="a"))
    with pytest.raises(SamplingParamsError, match="StructuredOutputsParams"):
        SamplingParams(structured_outputs={"regex": "a"})
