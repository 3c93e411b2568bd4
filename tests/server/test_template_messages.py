from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autodeploy.chat import chat_prompts
from autodeploy.checkpoint import load_tokenizer
from autodeploy.errors import InvalidRequestError
from autodeploy.server.parsing import template_messages
from autodeploy.server.parsing.template_shape import TemplateShape, template_shape

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo_model"
PLAIN = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
PARTS = (
    "{% for m in messages %}{% set c = m.content %}"
    "{% for part in c %}{{ part.text }}{% endfor %}{% endfor %}"
)
BOTH = (
    "{% macro show(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content %}{{ part.text }}{% endfor %}{% endif %}{% endmacro %}"
    "{% for m in messages %}{% generation %}{{ show(m.content) }}{% endgeneration %}{% endfor %}"
)
DICT_CALLS = (
    "{% for m in messages %}{% for call in m.tool_calls %}{% set f = call.function %}"
    "{{ f.name }}{{ f.arguments | tojson }}{% endfor %}{% endfor %}"
)
ITEMS_CALLS = (
    "{% for m in messages %}{% for call in m.tool_calls %}"
    "{% for k, v in call.function.arguments.items() %}{{ k }}{% endfor %}{% endfor %}{% endfor %}"
)
TEXT_CALLS = (
    "{% for m in messages %}{% if m['content'] is none %}{% for call in m['tool_calls'] %}"
    "{{ call['function']['name'] + call['function']['arguments'] }}"
    "{% endfor %}{% endif %}{% endfor %}"
)
OR_CALLS = (
    "{% for m in messages %}{% for c in m.tool_calls %}{% set args = c.function.arguments or {} %}"
    "{% for k, v in args.items() %}{{ k }}{% endfor %}{% endfor %}{% endfor %}"
)
GET_CONTENT = (
    "{% for m in messages %}{% set c = m.get('content') %}{% if c is string %}{{ c }}"
    "{% elif c is not none %}{% for part in c %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
)
THINKS = (
    "{% for m in messages %}{{ m.thinking }}{% if m.role == 'developer' %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "shape"),
    [
        ("", TemplateShape()),
        ("{% broken", TemplateShape()),
        (PLAIN, TemplateShape()),
        (PARTS, TemplateShape(content_parts=True)),
        (BOTH, TemplateShape()),
        (DICT_CALLS, TemplateShape()),
        (ITEMS_CALLS, TemplateShape()),
        (TEXT_CALLS, TemplateShape(text_arguments=True, none_content=True)),
        (OR_CALLS, TemplateShape()),
        (GET_CONTENT, TemplateShape(none_content=True)),
        (THINKS, TemplateShape(thinking=True, developer=True)),
    ],
)
def test_a_template_shows_what_it_takes(template, shape):
    assert template_shape(template) == shape


USER = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}
    ],
    "refusal": None,
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "42"}


def test_parts_become_a_string_or_a_string_becomes_parts():
    assert template_messages([USER], PLAIN) == [{"role": "user", "content": "a\nb"}]
    assert template_messages([{"role": "user", "content": "a"}], PARTS) == [
        {"role": "user", "content": [{"type": "text", "text": "a"}]}
    ]


def test_calls_have_arguments_as_the_template_takes_them():
    _, call, result = template_messages([USER, CALL, RESULT], DICT_CALLS)
    assert call["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": "é"}}
    assert call["content"] == ""
    assert result == {"role": "tool", "tool_call_id": "c1", "content": "42", "name": "f"}
    (call,) = template_messages([CALL], TEXT_CALLS)
    assert call["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"x": "é"}'}
    assert call["content"] is None


def test_reasoning_is_handed_on_under_the_templates_name():
    message = {"role": "assistant", "content": "a", "reasoning": "because"}
    assert template_messages([message], PLAIN)[0]["reasoning_content"] == "because"
    assert template_messages([message], THINKS)[0]["thinking"] == "because"


def test_a_developer_is_the_system_where_the_template_knows_none():
    message = {"role": "developer", "content": "a"}
    assert template_messages([message], PLAIN)[0]["role"] == "system"
    assert template_messages([message], THINKS)[0]["role"] == "developer"


@pytest.mark.parametrize(
    ("message", "path"),
    [
        ("hi", r"messages\[0\]:"),
        ({"content": "a"}, r"messages\[0\].role"),
        ({"role": "user"}, r"messages\[0\].content"),
        ({"role": "user", "content": 3}, "content"),
        ({"role": "user", "content": [3]}, r"content\[0\]"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "only text"),
        ({"role": "user", "content": [{"type": ["text"]}]}, "only text"),
        ({"role": "user", "content": [{"type": "text"}]}, r"content\[0\].text"),
        ({"role": "user", "content": "a", "name": 1}, "name"),
        ({"role": "assistant", "tool_calls": "f"}, "tool_calls"),
        ({"role": "assistant", "tool_calls": [{}]}, r"tool_calls\[0\].function"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
         "cut off"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "1"}}]},
         "arguments"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 1}}]},
         "arguments"),
        ({"role": "assistant", "content": "a", "reasoning": 1}, "reasoning"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_with_its_place(message, path):
    with pytest.raises(InvalidRequestError, match=path):
        template_messages([message], DICT_CALLS)


def test_the_demo_models_template_renders_a_conversation_with_tools():
    tokenizer = load_tokenizer(DEMO)
    messages = template_messages([USER, CALL, RESULT], tokenizer.chat_template)
    (prompt,) = chat_prompts(tokenizer, messages)
    assert prompt["prompt"] == (
        "<|bos|><|user|>a\nb<|end|><|assistant|><|end|><|tool|>42<|end|><|assistant|>"
    )


@pytest.mark.parametrize("messages", [None, [], "hi", {}])
def test_messages_are_a_list(messages):
    with pytest.raises(InvalidRequestError, match="messages"):
        template_messages(messages, PLAIN)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "tool_calls", "function", "name", "arguments", "type",
                         "text", "id", "reasoning"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(
    st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["assistant", "tool"])}).flatmap(
            lambda role: st.dictionaries(
                st.sampled_from(["content", "tool_calls", "name", "tool_call_id"]), ANYTHING
            ).map(lambda fields: {**fields, **role})
        ),
        min_size=1,
        max_size=3,
    )
)
def test_any_json_is_taken_or_refused(messages):
    for template in (PARTS, DICT_CALLS, TEXT_CALLS):
        try:
            assert len(template_messages(messages, template)) == len(messages)
        except InvalidRequestError:
            continue
