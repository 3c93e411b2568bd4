import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parsed_texts import GOOD, TOOLS, cut, parser, same_for_all_chunks, streamed, without_ids

from autodeploy.errors import ConfigError
from autodeploy.server.parsing import ToolDelta, join, tool_format, tool_formats

FORMATS = sorted(tool_formats())
MARKERS = sorted(
    {word for form in tool_formats().values() for word in (*form.markers, *form.inner)}
)
# What texts of all formats are made of, so that arbitrary ones come close to calls.
SCRAPS = [
    *MARKERS, "<｜tool▁sep｜>", "functions.now", " to=", "assistant", "commentary", "now", "write",
    '{"name": "', '"arguments": ', '"parameters": {"a": ', "{}", "{", "}", "[", "]", "(", ")", '"',
    "\\", "\\u12", "\n", " ", ",", ":", "=", "a", "1", "-", "é", "```json", "null", "'", ";",
    "<function=now>", "<parameter=a>", "<tool_c", "<|", "[TOOL",
]  # fmt: skip


def meant(parsed):
    return [(call.name, json.loads(call.arguments)) for call in parsed.tool_calls]


@pytest.mark.parametrize(("name", "text", "content", "calls"), GOOD)
def test_what_models_write_is_read(name, text, content, calls):
    parsed = parser(name).whole(text)
    assert meant(parsed) == calls
    assert parsed.content == content


@pytest.mark.parametrize(("name", "text", "content", "calls"), GOOD)
def test_character_by_character_gives_the_same(name, text, content, calls):
    pieces = streamed(parser(name), text)
    assert without_ids(join(pieces)) == without_ids(parser(name).whole(text))


@pytest.mark.parametrize(("name", "text", "content", "calls"), GOOD)
def test_any_beginning_of_a_good_text_can_be_the_end(name, text, content, calls):
    for length in range(len(text)):
        same_for_all_chunks(parser(name), text[:length], list(text[:length]))


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_chunks_of_any_text_give_the_same(name, data):
    text = "".join(data.draw(st.lists(st.sampled_from(SCRAPS) | st.text(max_size=3), max_size=14)))
    same_for_all_chunks(parser(name), text, data.draw(cut(text)))


@pytest.mark.parametrize(("name", "text", "content", "calls"), GOOD)
def test_a_damaged_call_never_raises_and_gives_valid_json(name, text, content, calls):
    rng = random.Random(text)
    for _ in range(40):
        at, length = rng.randrange(len(text)), rng.randrange(4)
        damaged = text[:at] + rng.choice(SCRAPS) + text[at + length :]
        for call in parser(name).whole(damaged).tool_calls:
            assert isinstance(json.loads(call.arguments), dict)
        same_for_all_chunks(parser(name), damaged, list(damaged))


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=30, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_characters="<[{ \t\r\n", codec="utf-8")))
def test_text_without_calls_comes_out_as_it_is(name, text):
    assert (parser(name).whole(text).content or "") == text


@pytest.mark.parametrize("name", FORMATS)
def test_the_beginning_of_a_marker_is_held_back_and_given_out_at_the_end(name):
    for marker in tool_format(name).markers:
        stream = parser(name).stream()
        assert stream.push(f"a {marker[:-1]}") == ["a"]
        assert stream.end() == [f" {marker[:-1]}"]


BAD = [
    ("hermes", '<tool_call>{"name": "f", "arguments": {bad}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1,}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call> and so on'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "cut'),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", "the tag <tool_call> begins a call"),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": "[1]"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 500),
    ("hermes", '<tool_call>{"function": ' + '{"function": ' * 600),
    ("hermes", '<tool_call>{"id": ' + "[" * 2000),
    ("pythonic", "[write(text=" + "[" * 2000),
    ("json", '{"name": "Bob", "age": 3}'),
    ("json", '{"name": "Bob", "parameters": {}}'),
    ("json", '[{"a": 1}]'),
    ("llama3_json", '<|python_tag|>brave_search.call(query="x")'),
    ("mistral", "[TOOL_CALLS]now[ARGS]nothing"),
    ("mistral", "[TOOL_CALLS][]"),
    ("pythonic", "[see also (this)]"),
    ("pythonic", "[now(a)]"),
    ("pythonic", "[unknown(a=1)]"),
    ("deepseek_v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f {}"),
    ("openai", "<|channel|>commentary to=browser.search<|message|>{}<|call|>"),
    ("openai", "<|channel|>commentary to=functions.now<|message|>later<|call|>"),
    ("qwen3_coder", "<tool_call><function=f><parameter=a>never closed"),
    ("granite", "<|tool_call|> nothing"),
]


@pytest.mark.parametrize(("name", "text"), BAD)
def test_a_malformed_call_is_content(name, text):
    parsed = parser(name).whole(text)
    assert (parsed.content, parsed.tool_calls) == (text, ())


@pytest.mark.parametrize(("name", "text"), BAD)
def test_a_malformed_call_is_the_same_in_any_chunks(name, text):
    same_for_all_chunks(parser(name), text, list(text))


def test_a_call_after_a_malformed_one_is_read():
    text = '<tool_call>{"name": x}</tool_call>\n<tool_call>{"name": "now"}</tool_call>'
    parsed = parser("hermes").whole(text)
    assert parsed.content == '<tool_call>{"name": x}</tool_call>'
    assert meant(parsed) == [("now", {})]


def test_name_and_id_come_first_then_the_arguments_as_they_arrive():
    stream = parser("hermes").stream()
    assert stream.push('<tool_call>{"name": "get_weather", "argum') == []
    assert stream.push('ents": ') == []
    head, opening = stream.push('{"ci')
    assert (head.index, head.name) == (0, "get_weather")
    assert head.id
    assert opening == ToolDelta(0, arguments='{"ci')
    assert stream.push('ty": "Z\\u00') == [ToolDelta(0, arguments='ty": "Z')]
    assert stream.push('fc"}}</tool') == [ToolDelta(0, arguments='\\u00fc"}')]
    assert stream.push("_call>\n") == []
    assert stream.end() == []


def test_line_breaks_in_strings_become_json():
    parsed = parser("hermes").whole('<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}')
    assert meant(parsed) == [("f", {"a": "x\ny"})]


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 200])
def test_white_space_before_a_call_is_dropped_but_never_held_back_without_end(length):
    call = '<tool_call>{"name": "now"}</tool_call>'
    text = "a" + "\n" * length + call
    same_for_all_chunks(parser("hermes"), text, list(text))
    assert len(parser("hermes").whole(text).content) == 1 + max(0, length - 64)
    assert parser("hermes").whole("a" + " " * length).content == "a" + " " * length


def test_a_call_that_breaks_in_a_stream_ends_there():
    pieces = streamed(parser("hermes"), ['<tool_call>{"name": "f", "arguments": {"a": 1, oh}}'])
    parsed = join(pieces)
    assert parsed.tool_calls[0].arguments == '{"a": 1, '
    assert parsed.content == "oh}}"


def test_only_the_first_call_is_kept_where_calls_may_not_be_parallel():
    one = '<tool_call>{"name": "now"}</tool_call>'
    assert len(parser("hermes", parallel=False).whole(one + one).tool_calls) == 1


def test_bare_values_have_the_types_of_the_schema():
    tools = {
        "f": {
            "properties": {
                "text": {"type": "string"},
                "count": {"type": "integer"},
                "share": {"type": "number"},
                "on": {"type": "boolean"},
                "list": {"type": "array"},
                "maybe": {"type": ["string", "null"]},
                "choice": {"enum": [1, 2]},
            }
        }
    }
    values = {
        "text": "12", "count": "3.0", "share": "2", "on": "True", "list": "['a', None]",
        "maybe": "null", "choice": "2", "other": "5",
    }  # fmt: skip
    body = "".join(f"<parameter={k}>\n{v}\n</parameter>" for k, v in values.items())
    whole = type(parser("qwen3_coder"))(tool_format("qwen3_coder"), parameters=tools).whole(
        f"<function=f>{body}</function>"
    )
    assert meant(whole) == [(
        "f",
        {"text": "12", "count": 3, "share": 2, "on": True, "list": ["a", None], "maybe": None,
         "choice": 2, "other": "5"},
    )]  # fmt: skip


def test_ids_are_unique_and_have_the_shape_that_templates_insist_on():
    first, second = parser("mistral").whole("[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]now{}").tool_calls
    assert first.id != second.id
    assert all(len(call.id) == 9 and call.id.isalnum() for call in (first, second))
    assert parser("json").whole('{"name": "now", "arguments": {}}').tool_calls[0].id[:5] == "call_"


def test_every_example_names_its_tools():
    assert {name for *_, calls in GOOD for name, _ in calls} == set(TOOLS)


def test_an_unknown_format_is_an_error_that_names_the_known_ones():
    with pytest.raises(ConfigError, match="hermes"):
        tool_format("none_such")
