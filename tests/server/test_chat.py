"""POST /v1/chat/completions, and what becomes of messages."""

from test_completions import events

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Return the sum of two numbers."}]
GREEDY = {"model": "demo", "temperature": 0, "max_tokens": 10, "messages": MESSAGES}


def chat(server, **fields):
    response = server.post(PATH, **{**GREEDY, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_message_comes_back(server):
    answer = chat(server)
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert answer["usage"]["completion_tokens"] == 10


def test_a_stream_opens_with_the_role_and_joins_to_the_whole(server):
    whole = chat(server)["choices"][0]["message"]["content"]
    chunks = events(server, PATH, **GREEDY)
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(d.get("content", "") for d in deltas) == whole
    assert [c["choices"][0]["finish_reason"] for c in chunks][-2:] == [None, "length"]
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}


def test_n_messages_stream_side_by_side(server):
    fields = {"n": 3, "temperature": 1, "seed": 4}
    texts = ["", "", ""]
    for chunk in events(server, PATH, **{**GREEDY, **fields}):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [c["message"]["content"] for c in chat(server, **fields)["choices"]]


def test_each_token_has_its_logprobs(server):
    content = chat(server, logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"]
    assert len(content) == 10
    for entry in content:
        assert entry["token"] == entry["top_logprobs"][0]["token"]  # greedy
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert values == sorted(values, reverse=True)
        assert len(values) == 3
        assert bytes(entry["bytes"]).decode() == entry["token"]
    none = chat(server, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert none[0]["top_logprobs"] == []


def test_usage_can_be_told_with_every_event(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(server, PATH, **GREEDY, stream_options=options)
    counts = [c["usage"]["completion_tokens"] for c in chunks]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == 10


def test_parts_of_text_are_a_text(server):
    parts = [{"type": "text", "text": MESSAGES[0]["content"]}]
    asked = [{"role": "user", "content": parts}]
    assert chat(server, messages=asked)["choices"] == chat(server)["choices"]


def test_the_newer_name_of_max_tokens_wins(server):
    assert chat(server, max_completion_tokens=3)["usage"]["completion_tokens"] == 3


def test_a_message_without_a_limit_goes_on_to_its_end(server):
    fields = {k: v for k, v in GREEDY.items() if k != "max_tokens"}
    answer = server.post(PATH, **fields).json()
    assert answer["usage"]["completion_tokens"] > 16


def test_openais_bookkeeping_fields_change_nothing(server):
    plain = chat(server)["choices"]
    fields = {
        "user": "u", "store": False, "metadata": {"a": "b"}, "service_tier": "auto",
        "safety_identifier": "s", "prompt_cache_key": "k", "parallel_tool_calls": True,
        "modalities": ["text"], "response_format": {"type": "text"}, "reasoning_effort": "low",
        "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip
    assert chat(server, **fields)["choices"] == plain


def test_the_conversation_reaches_the_template(server):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]
    assert chat(server, messages=messages)["choices"]
    found = server.post("/tokenize", messages=messages[:2]).json()
    text = server.post("/detokenize", tokens=found["tokens"]).json()["prompt"]
    assert text == "<|bos|><|system|>s<|end|><|user|>u<|end|><|assistant|>"
    assert found["count"] == len(found["tokens"])


def test_the_last_message_can_be_continued(server):
    messages = [*MESSAGES, {"role": "assistant", "content": "def add(a, b):"}]
    answer = chat(
        server, messages=messages, add_generation_prompt=False, continue_final_message=True
    )
    assert answer["choices"][0]["message"]["content"].startswith("\n    ")
