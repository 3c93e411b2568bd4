import pytest

from autodeploy.server.parsing import detect, reasoning_formats, tool_formats
from autodeploy.server.parsing.detect import Detected

# Fragments of the published templates, as short as shows the format.
TEMPLATES = [
    (None, None, None),
    ("{{ bos_token }}<|user|>{{ content }}", None, None),
    ('within <tool_call></tool_call> tags: {"name": <function-name>}', "hermes", None),
    ("<tool_call> ... content.split('</think>')[-1]", "hermes", "qwen3"),
    ("<tool_call>\n<function=example>\n<parameter=one>\n</parameter>", "qwen3_coder", None),
    ("{{ '[TOOL_CALLS]' }} [THINK]", "mistral", "mistral"),
    ('<|start_header_id|> {"name": f, "parameters": dictionary} <|python_tag|>', "llama3_json",
     None),
    ("<|header_start|> [func_name1(params_name1=params_value1)]", "pythonic", None),
    ("<｜tool▁calls▁begin｜><｜tool▁sep｜>\\n```json\\n </think>", "deepseek_v3", "qwen3"),
    ("<｜tool▁calls▁begin｜><｜tool▁sep｜> </think>", "deepseek_v31", "qwen3"),
    ("<|start|>assistant<|channel|>commentary to=functions.<|message|>", "openai",
     "openai_gptoss"),
    ("<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key> </think>", "glm45", "qwen3"),
    ("<|tool_calls_section_begin|> <think></think>", "kimi_k2", "qwen3"),
    ("'<seed:tool_call>' <function=f> <parameter=p> '<seed:think>'", "seed_oss", "seed_oss"),
    ("<|tool_call|> Here is my thought process: Here is my response:", "granite", "granite"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "tools", "reasoning"), TEMPLATES)
def test_a_template_shows_its_formats(template, tools, reasoning):
    assert detect(template) == Detected(tools, reasoning)


def test_the_names_of_formats_are_these():
    assert sorted(tool_formats()) == [
        "deepseek_v3", "deepseek_v31", "glm45", "glm47", "granite", "hermes", "json", "kimi_k2",
        "llama3_json", "llama4_json", "llama4_pythonic", "minimax_m2", "mistral", "olmo3", "openai",
        "phi4_mini_json", "pythonic", "qwen3_coder", "qwen3_xml", "seed_oss",
    ]  # fmt: skip
    assert sorted(reasoning_formats()) == [
        "deepseek_r1", "deepseek_v3", "gemma4", "glm45", "granite", "kimi_k2", "minimax_m2",
        "mistral", "openai_gptoss", "qwen3", "seed_oss", "step3",
    ]  # fmt: skip


def test_no_marker_of_a_format_begins_another():
    for form in [*tool_formats().values(), *reasoning_formats().values()]:
        for one in form.markers:
            assert not any(one != other and other.startswith(one) for other in form.markers)
