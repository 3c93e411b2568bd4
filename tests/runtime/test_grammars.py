"""Constraints compile, or say why not, whatever is in them; each only once."""

import threading

import pytest
from toy_tokenizers import byte_level, metaspace

from autodeploy.errors import SamplingParamsError
from autodeploy.runtime import grammars as grammars_module
from autodeploy.runtime.grammars import Grammars, grammars_of
from autodeploy.runtime.structured_params import StructuredOutputsParams as Structured

TOKENIZERS = {"byte level": byte_level(), "metaspace": metaspace()}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


@pytest.fixture
def grammars(tokenizer):
    return grammars_of(tokenizer, len(tokenizer), [tokenizer.eos_token_id])


def accepts(matcher, tokenizer, text):
    """Whether the text is all of an output."""
    # The first word of a sentence carries a space in some tokenizers; bytes never do.
    ids = matcher_tokens(tokenizer, text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def matcher_tokens(tokenizer, text):
    if "<0x61>" in tokenizer.get_vocab():
        return [tokenizer.convert_tokens_to_ids(f"<0x{b:02X}>") for b in text.encode()]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


EXAMPLES = {
    "schema": ({"json": {"type": "object", "properties": {"a": {"type": "integer"}},
                         "required": ["a"], "additionalProperties": False}},
               ['{"a": 1}', '{ "a" :-3}'], ["{}", '{"a": "x"}', '{"a": 1} x']),
    "dense schema": ({"json": {"type": "array", "items": {"type": "null"}},
                      "disable_any_whitespace": True}, ["[]", "[null,null]"], ["[ ]", "null"]),
    "object": ({"json_object": True}, ["{}", '{"x": [1, {"y": null}]}'], ["[]", "1"]),
    "regex": ({"regex": r"[a-c]{2,3}\d|é+"}, ["ab1", "ccc0", "éé"], ["ab", "abcd1", "x"]),
    "choices": ({"choice": ['a"b\\c', "line\nbreak", "日本", "a", "ab.*"]},
                ['a"b\\c', "line\nbreak", "日本", "a", "ab.*"], ["ab", "b"]),
    "lark": ({"grammar": 'start: "(" start ")" | /[0-9]+/'}, ["7", "((12))"], ["(1", "()"]),
    "gbnf": ({"grammar": 'root ::= "x" | "y" root\n'}, ["x", "yyx"], ["y", "z"]),
}  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES)
def test_texts_are_accepted_as_the_constraint_says(example, grammars, tokenizer):
    fields, good, bad = EXAMPLES[example]
    for text in good:
        assert accepts(grammars.compile(Structured(**fields)), tokenizer, text), text
    for text in bad:
        assert not accepts(grammars.compile(Structured(**fields)), tokenizer, text), text


REFUSED = [
    {"json": {"type": "nope"}},
    {"json": {"$ref": "https://example.com/schema.json"}},
    {"json": {"not": {"type": "string"}}},
    {"json": {"type": "string", "pattern": "(?=a)b"}},
    {"json": {"allOf": [{"type": "string"}, {"type": "number"}]}},
    {"json": '{"items":' * 1000 + "{}" + "}" * 1000},
    {"json": '{"properties": {"a":' * 70 + "{}" + "}}" * 70},
    {"regex": "("},
    {"regex": "(" * 2000 + "a" + ")" * 2000},
    {"grammar": "start: nobody"},
    {"grammar": "start: (("},
    {"grammar": "no grammar at all"},
    {"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000},
    {"grammar": "root ::= ("},
    {"grammar": "root ::= nobody"},
]


@pytest.mark.parametrize("fields", REFUSED, ids=lambda fields: f"{fields!r:.50}")
def test_what_cannot_be_compiled_is_refused_with_the_reason(fields, grammars):
    kind = next(iter(fields))
    with pytest.raises(SamplingParamsError, match=rf"structured_outputs.{kind} .+: .+") as caught:
        grammars.compile(Structured(**fields))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "grammar",
    [
        "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(5000)) + 'r5000: "a"',
        "start: R0\n" + "".join(f"R{i}: R{i + 1}\n" for i in range(5000)) + 'R5000: "a"',
    ],
    ids=["rules", "terminals"],
)
def test_deep_grammars_do_not_end_the_process(grammar):
    tokenizer = TOKENIZERS["byte level"]
    found = grammars_of(tokenizer, len(tokenizer), [1])
    assert accepts(found.compile(Structured(grammar=grammar)), tokenizer, "a")


def test_many_choices_are_one_word():
    tokenizer = TOKENIZERS["byte level"]
    found = grammars_of(tokenizer, len(tokenizer), [1])
    matcher = found.compile(Structured(choice=[f"no {i}" for i in range(5000)]))
    assert accepts(matcher, tokenizer, "no 4999")


def test_a_grammar_is_compiled_once_and_each_request_has_its_own_copy(grammars, tokenizer):
    params = Structured(regex="abc|abd[0-9]")
    assert grammars.find(params) is None
    first = grammars.compile(params)
    second = grammars.find(Structured(regex="abc|abd[0-9]"))
    assert accepts(first, tokenizer, "abc")
    assert accepts(second, tokenizer, "abd3")
    assert grammars.find(Structured(regex="abc|abd[0-9]", disable_any_whitespace=True)) is None


def test_the_grammar_used_longest_ago_makes_room(monkeypatch):
    tokenizer = TOKENIZERS["byte level"]
    monkeypatch.setattr(grammars_module, "KEPT", 2)
    found = Grammars(tokenizer.backend_tokenizer.to_str(), len(tokenizer), [1])
    one, two, three = (Structured(choice=[c]) for c in "abc")
    for params in (one, two, one, three):
        found.compile(params)
    assert [found.find(p) is not None for p in (one, two, three)] == [True, False, True]


def test_tables_are_made_once_for_equal_tokenizers():
    assert grammars_of(byte_level(), 300, [1]) is grammars_of(byte_level(), 300, [1])
    assert grammars_of(byte_level(), 300, [1]) is not grammars_of(byte_level(), 300, [1, 2])


def test_a_wider_vocabulary_is_fine_and_a_narrower_one_is_refused(tokenizer):
    wide = grammars_of(tokenizer, len(tokenizer) + 70, [1]).compile(Structured(regex="a"))
    assert len(wide.compute_bitmask()) * 8 >= len(tokenizer) + 70
    with pytest.raises(SamplingParamsError, match="this tokenizer"):
        grammars_of(tokenizer, len(tokenizer) - 1, [1])


def test_a_tokenizer_whose_tokens_are_other_bytes_is_refused():
    raw = TOKENIZERS["metaspace"].backend_tokenizer.to_str()
    with pytest.raises(SamplingParamsError, match="decode to is not known"):
        Grammars(raw, len(TOKENIZERS["metaspace"]), [1])


@pytest.mark.parametrize(
    ("tokenizer", "ends", "reason"),
    [(None, [1], "needs a tokenizer"), ("slow", [1], "fast"), (byte_level(), [], "end-of-seq"),
     (byte_level(), [5000, -1], "end-of-seq")],
)  # fmt: skip
def test_without_what_it_needs_it_says_so(tokenizer, ends, reason):
    with pytest.raises(SamplingParamsError, match=reason):
        grammars_of(tokenizer, 300, ends)


def test_threads_that_start_later_have_their_usual_stack(grammars):
    before = threading.stack_size()
    grammars.compile(Structured(regex="x{3}"))
    assert threading.stack_size() == before
