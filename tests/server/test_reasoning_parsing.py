import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parsed_texts import TOOLS, cut, same_for_all_chunks, streamed

from autodeploy.server.parsing import (
    AnswerParser,
    Reasoning,
    join,
    reasoning_format,
    reasoning_formats,
    tool_format,
)

FORMATS = sorted(reasoning_formats())


def parser(name, tools=None):
    return AnswerParser(tool_format(tools) if tools else None, reasoning_format(name), TOOLS)


@pytest.mark.parametrize(
    ("name", "text", "reasoning", "content"),
    [
        ("qwen3", "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
        ("qwen3", "<think>\n\n</think>\n\nYes.", None, "Yes."),
        ("qwen3", "No reasoning.", None, "No reasoning."),
        ("qwen3", "The tag <think> opens it.", None, "The tag <think> opens it."),
        ("qwen3", "<think>Never ends", "Never ends", None),
        ("qwen3", "<think>a</think>b</think>c", "a", "b</think>c"),
        ("deepseek_r1", "Hm.\n</think>\nYes.", "Hm.", "Yes."),
        ("deepseek_r1", "<think>Hm.</think>Yes.", "Hm.", "Yes."),
        ("deepseek_r1", "Never ends", "Never ends", None),
        ("mistral", "[THINK]Hm.[/THINK]Yes.", "Hm.", "Yes."),
        ("granite", "Here is my thought process:\nHm.\n\nHere is my response: Yes.", "Hm.", "Yes."),
        ("granite", "Here's my thought process: Hm. Here's my response: Yes.", "Hm.", "Yes."),
        ("granite", "Here is an answer.", None, "Here is an answer."),
        ("seed_oss", "<seed:think>Hm.</seed:think>Yes.", "Hm.", "Yes."),
        ("gemma4", "<|channel>thought\nHm.\n<channel|>Yes.", "Hm.", "Yes."),
        ("openai_gptoss", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>"
         "final<|message|>Yes.<|return|>", "Hm.", "Yes."),
        ("openai_gptoss", "<|channel|>analysis<|message|>Hm.<|start|>assistant<|channel|>final"
         "<|message|>Yes.", "Hm.", "Yes."),
        ("openai_gptoss", "Yes.", None, "Yes."),
    ],
)  # fmt: skip
def test_reasoning_is_split_from_content(name, text, reasoning, content):
    for parsed in (parser(name).whole(text), join(streamed(parser(name), text))):
        assert (parsed.reasoning, parsed.content) == (reasoning, content)


def test_a_template_may_have_opened_the_reasoning_or_closed_it():
    opened = parser("qwen3").whole("Hm.</think>Yes.", prompt="<|assistant|><think>\n")
    assert (opened.reasoning, opened.content) == ("Hm.", "Yes.")
    closed = parser("deepseek_r1").whole("Yes.", prompt="<|assistant|><think>\n\n</think>\n\n")
    assert (closed.reasoning, closed.content) == (None, "Yes.")


@pytest.mark.parametrize(
    ("reasoning", "tools", "text"),
    [
        ("qwen3", "hermes", "<think>I could <tool_call>.</think>\n"
         '<tool_call>{"name": "now", "arguments": {}}</tool_call>'),
        ("deepseek_r1", "json", 'I could <tool_call>. </think> {"name": "now", "arguments": {}}'),
        ("openai_gptoss", "openai", "<|channel|>analysis<|message|>I could <tool_call>.<|end|>"
         "<|start|>assistant<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}"
         "<|call|>"),
        ("openai_gptoss", "openai", "<|channel|>analysis<|message|>I could <tool_call>.<|end|>"
         "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}<|call|>"),
    ],
)  # fmt: skip
def test_calls_come_after_the_reasoning_and_never_out_of_it(reasoning, tools, text):
    both = parser(reasoning, tools)
    for parsed in (both.whole(text), join(streamed(both, text))):
        assert parsed.reasoning == "I could <tool_call>."
        assert [(call.name, call.arguments) for call in parsed.tool_calls] == [("now", "{}")]
        assert parsed.content is None


def test_a_call_without_reasoning_reaches_the_tools():
    text = " to=functions.now<|channel|>commentary json<|message|>{}<|call|>"
    (call,) = parser("openai_gptoss", "openai").whole(text).tool_calls
    assert call.name == "now"


def test_reasoning_streams_and_holds_back_what_may_be_the_closing_tag():
    stream = parser("qwen3").stream()
    assert stream.push("<thi") == []
    assert stream.push("nk>One two </th") == [Reasoning("One two")]
    assert stream.push("ree") == [Reasoning(" </three")]
    assert stream.push("</think") == []
    assert stream.push(">\n\nYes") == ["Yes"]
    assert stream.end() == []


SCRAPS = ["<think>", "</think>", "Here is my ", "thought process:", "response:", "[THINK]", " ",
          "[/THINK]", "<|channel|>", "analysis", "final", "<|message|>", "<|end|>", "<|start|>",
          "assistant", "\n", "a", "</thi", "<seed:think>", "</seed:think>", "to=", "é",
          "<|channel>thought", "<channel|>"]  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_chunks_of_any_text_give_the_same(name, data):
    text = "".join(data.draw(st.lists(st.sampled_from(SCRAPS) | st.text(max_size=3), max_size=12)))
    same_for_all_chunks(parser(name), text, data.draw(cut(text)))


@pytest.mark.parametrize("name", FORMATS)
def test_an_empty_answer_has_no_parts(name):
    parsed = parser(name).whole("")
    assert (parsed.content, parsed.reasoning, parsed.tool_calls) == (None, None, ())


def test_special_tokens_are_needed_where_markers_are_among_them():
    assert parser("mistral").needs_special_tokens(["</s>", "[THINK]"])
    assert parser("qwen3", "deepseek_v3").needs_special_tokens(["<｜tool▁sep｜>"])
    assert not parser("qwen3", "hermes").needs_special_tokens(["<|im_end|>", ""])
