"""Answers as models write them, with the calls they mean; and any text cut into any pieces."""

from hypothesis import strategies as st

from autodeploy.server.parsing import AnswerParser, join, merge, tool_format

WEATHER = ("get_weather", {"city": "Zürich", "days": 3})
NESTED = ("write", {"text": 'if (a) { "b}"; } // <tool_call> ]', "more": {"x": [1, None, {}]}})
NOTHING = ("now", {})

_W = '{"city": "Zürich", "days": 3}'
_N = r'{"text": "if (a) { \"b}\"; } // <tool_call> ]", "more": {"x": [1, null, {}]}}'
_V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
_V31 = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"

# format, text, content, calls
GOOD = [
    ("hermes", f'<tool_call>\n{{"name": "get_weather", "arguments": {_W}}}\n</tool_call>', None,
     [WEATHER]),
    ("hermes", f'Let me see.\n\n<tool_call>{{"name": "get_weather", "arguments": {_W}}}</tool_call>'
     f'\n<tool_call>\n{{"arguments": {_N}, "name": "write"}}</tool_call>\n', "Let me see.",
     [WEATHER, NESTED]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call> Done.', "Done.", [NOTHING]),
    ("hermes", f'<tool_call>{{"name": "get_weather", "arguments": {_W}', None, [WEATHER]),
    ("hermes", '<tool_call>{"name": "get_weather", "arguments": '
     '"{\\"city\\": \\"Zürich\\", \\"days\\": 3}"}</tool_call>', None, [WEATHER]),
    ("hermes", f'<tool_call>{{"type": "function", "id": "1", "function": {{"name": "get_weather", '
     f'"arguments": {_W}}}}}</tool_call>', None, [WEATHER]),
    ("llama3_json", f'{{"name": "get_weather", "parameters": {_W}}}; '
     f'{{"name": "write", "parameters": {_N}}}', None, [WEATHER, NESTED]),
    ("llama3_json", f'<|python_tag|>{{"name": "get_weather", "parameters": {_W}}}', None,
     [WEATHER]),
    ("llama3_json", f'{{"type": "function", "function": "get_weather", "parameters": {_W}}}', None,
     [WEATHER]),
    ("mistral", f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {_W}}}, '
     f'{{"name": "write", "arguments": {_N}}}]', None, [WEATHER, NESTED]),
    ("mistral", f"Yes.[TOOL_CALLS]get_weather[ARGS]{_W}[TOOL_CALLS]write[ARGS]{_N}", "Yes.",
     [WEATHER, NESTED]),
    ("mistral", f"[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{_W}", None, [WEATHER]),
    ("pythonic", '[get_weather(city="Zürich", days=3), write(text=\'if (a) { "b}"; } '
     "// <tool_call> ]', more={'x': [1, None, {}]}), now()]", None, [WEATHER, NESTED, NOTHING]),
    ("llama4_pythonic", "Well.<|python_start|>[get_weather(city='Z\\u00fcrich', days=3)]"
     "<|python_end|>", "Well.", [WEATHER]),
    ("deepseek_v3", "I look.<｜tool▁calls▁begin｜>" + _V3.format("get_weather", _W) + "\n"
     + _V3.format("write", _N) + "<｜tool▁calls▁end｜>", "I look.", [WEATHER, NESTED]),
    ("deepseek_v31", "<｜tool▁calls▁begin｜>" + _V31.format("get_weather", _W)
     + _V31.format("write", _N) + "<｜tool▁calls▁end｜>", None, [WEATHER, NESTED]),
    ("openai", f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{_W}"
     "<|call|>", None, [WEATHER]),
    ("openai", f" to=functions.write<|channel|>commentary json<|message|>{_N}<|call|>", None,
     [NESTED]),
    ("openai", "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.now"
     "<|channel|>commentary<|message|><|call|>", "I look.", [NOTHING]),
    ("openai", "<|channel|>final<|message|>Hello.<|return|>", "Hello.", []),
    ("qwen3_coder", "I look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nZürich\n"
     "</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>", "I look.",
     [WEATHER]),
    ("qwen3_coder", '<function=write><parameter=text>if (a) { "b}"; } // <tool_call> ]</parameter>'
     '<parameter=more>\n{"x": [1, null, {}]}\n</parameter></function></tool_call>', None, [NESTED]),
    ("qwen3_xml", "<tool_call><function=now></function></tool_call>", None, [NOTHING]),
    ("seed_oss", "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Zürich</parameter>\n"
     "<parameter=days>3</parameter>\n</function>\n</seed:tool_call>", None, [WEATHER]),
    ("minimax_m2", '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Zürich'
     '</parameter>\n<parameter name="days">3</parameter>\n</invoke>\n<invoke name="now">\n</invoke>'
     "\n</minimax:tool_call>", None, [WEATHER, NOTHING]),
    ("glm45", "Oh.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Zürich</arg_value>"
     "\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n"
     "</tool_call>", "Oh.", [WEATHER, NOTHING]),
    ("kimi_k2", "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
     f"<|tool_call_argument_begin|>{_W}<|tool_call_end|><|tool_call_begin|>functions.write:1"
     f"<|tool_call_argument_begin|>{_N}<|tool_call_end|><|tool_calls_section_end|>", None,
     [WEATHER, NESTED]),
    ("phi4_mini_json", f'functools[{{"name": "get_weather", "arguments": {_W}}}]', None, [WEATHER]),
    ("olmo3", "<function_calls>\nget_weather(city='Zürich', days=3)\nnow()\n</function_calls>",
     None, [WEATHER, NOTHING]),
    ("granite", f'<|tool_call|>[{{"name": "get_weather", "arguments": {_W}}}]', None, [WEATHER]),
    ("granite", f'[{{"name": "write", "arguments": {_N}}}]', None, [NESTED]),
    ("json", f'{{"name": "get_weather", "arguments": {_W}}}', None, [WEATHER]),
    ("json", f'[{{"name": "get_weather", "parameters": {_W}}}, '
     '{"name": "now", "parameters": {}}]', None, [WEATHER, NOTHING]),
]  # fmt: skip

TOOLS = {
    "get_weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    },
    "write": {
        "type": "object",
        "properties": {"text": {"type": "string"}, "more": {"anyOf": [{"type": "object"}]}},
    },
    "now": {"type": "object", "properties": {}},
}


def parser(name, **options):
    return AnswerParser(tools=tool_format(name), parameters=TOOLS, **options)


def streamed(answer_parser, chunks, **options):
    """The pieces of a stream that is fed these chunks."""
    stream = answer_parser.stream(**options)
    return [piece for chunk in chunks for piece in stream.push(chunk)] + stream.end()


def without_ids(parsed):
    calls = [(call.name, call.arguments) for call in parsed.tool_calls]
    return parsed.content, calls, parsed.reasoning


@st.composite
def cut(draw, text):
    """The text in pieces."""
    places = sorted(draw(st.sets(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def same_for_all_chunks(answer_parser, text, chunks):
    """Cut into chunks or not, an answer gives the same, as a stream and as a whole."""
    whole = answer_parser.whole(text)
    assert without_ids(join(streamed(answer_parser, chunks, whole=True))) == without_ids(whole)
    once = streamed(answer_parser, [text])
    assert without_ids(join(streamed(answer_parser, chunks))) == without_ids(join(once))
    stream = answer_parser.stream()
    for pieces in (stream.push(text), stream.end()):
        assert merge(pieces) == pieces
