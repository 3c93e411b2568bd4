"""POST /v1/completions: prompts of every form, whole and streamed, with all there is to ask."""

import json

import pytest

from autodeploy import SamplingParams

GREEDY = {"model": "demo", "temperature": 0, "max_tokens": 8}


def complete(server, **fields):
    response = server.post("/v1/completions", **{**GREEDY, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def events(server, path="/v1/completions", **fields):
    with server.client.stream("POST", path, json={**GREEDY, **fields, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_completion_has_the_text_and_the_usage(server):
    answer = complete(server, prompt="def fib(n):")
    (choice,) = answer["choices"]
    assert choice["text"].startswith("\n    ")
    assert choice["finish_reason"] == "length"
    assert answer["object"] == "text_completion"
    assert answer["model"] == "demo"
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (7, 8)
    assert usage["total_tokens"] == 15


def test_the_events_of_a_stream_join_to_the_whole_answer(server):
    # Many tokens: those that come while nobody reads are told together.
    whole = complete(server, prompt="import os", max_tokens=48)["choices"][0]
    chunks = events(server, prompt="import os", max_tokens=48)
    assert "".join(c["choices"][0]["text"] for c in chunks) == whole["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]
    assert len(chunks) > 3
    assert len({c["id"] for c in chunks}) == 1
    assert all("usage" not in c for c in chunks)


def test_a_stream_tells_its_usage_in_a_last_event_without_choices(server):
    chunks = events(server, prompt="import os", stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == complete(server, prompt="import os")["usage"] | {
        "prompt_tokens_details": chunks[-1]["usage"]["prompt_tokens_details"]
    }
    assert all(c["usage"] is None for c in chunks[:-1])


def test_token_ids_are_prompts_too(server):
    ids = server.post("/tokenize", prompt="import os").json()["tokens"]
    text = complete(server, prompt="import os")["choices"][0]["text"]
    assert complete(server, prompt=ids)["choices"][0]["text"] == text
    two = complete(server, prompt=[ids, ids])["choices"]
    assert [c["text"] for c in two] == [text, text]


@pytest.mark.parametrize("streamed", [False, True])
def test_batched_prompts_come_back_in_order_with_n_choices_each(server, streamed):
    fields = {"prompt": ["import os", "class A"], "n": 2, "temperature": 1, "seed": 5}
    if streamed:
        texts = {}
        for chunk in events(server, **fields):
            (choice,) = chunk["choices"]
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        texts = [texts[index] for index in range(4)]
    else:
        choices = complete(server, **fields)["choices"]
        assert [c["index"] for c in choices] == [0, 1, 2, 3]
        texts = [c["text"] for c in choices]
    alone = [complete(server, **{**fields, "prompt": p})["choices"] for p in fields["prompt"]]
    assert texts == [c["text"] for choices in alone for c in choices]


def test_logprobs_are_parallel_lists_and_echo_puts_the_prompts_before(server):
    answer = complete(server, prompt="import os", logprobs=2, echo=True, max_tokens=3)
    choice = answer["choices"][0]
    found = choice["logprobs"]
    assert choice["text"].startswith("import os")
    count = answer["usage"]["total_tokens"]
    assert {len(v) for v in found.values()} == {count}
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    assert all(value <= 0 for value in found["token_logprobs"][1:])
    for token, tops in zip(found["tokens"][-3:], found["top_logprobs"][-3:], strict=True):
        assert max(tops, key=tops.get) == token  # greedy
        assert len(tops) == 2
    # Special tokens are no part of the text.
    for token, offset in zip(found["tokens"][1:], found["text_offset"][1:], strict=True):
        assert choice["text"][offset:].startswith(token)


def test_the_logprobs_of_a_stream_are_those_of_the_whole(server):
    whole = complete(server, prompt="import os", logprobs=1, echo=True)["choices"][0]["logprobs"]
    joined = {name: [] for name in whole}
    for chunk in events(server, prompt="import os", logprobs=1, echo=True):
        for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
            joined[name] += values
    assert joined["tokens"] == whole["tokens"]
    assert joined["text_offset"] == whole["text_offset"]


def test_echo_without_output_scores_the_prompt(server):
    answer = complete(server, prompt="import os", logprobs=0, echo=True, max_tokens=0)
    (choice,) = answer["choices"]
    assert choice["text"] == "import os"
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 0


def test_a_stop_string_ends_the_text_and_is_named(server):
    text = complete(server, prompt="def fib(n):", max_tokens=40)["choices"][0]["text"]
    stop = text[6:10]
    for chosen in (stop, ["never ever", stop]):
        choice = complete(server, prompt="def fib(n):", max_tokens=40, stop=chosen)["choices"][0]
        assert choice["text"] == text[: text.index(stop)]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    kept = complete(
        server, prompt="def fib(n):", max_tokens=40, stop=stop, include_stop_str_in_output=True
    )
    assert kept["choices"][0]["text"] == text[: text.index(stop)] + stop


def test_the_same_seed_gives_the_same_text(server):
    texts = {
        complete(server, prompt="import", temperature=1, seed=s, max_tokens=12)["choices"][0][
            "text"
        ]
        for s in (1, 1, 2, 3)
    }
    assert len(texts) in (2, 3)


def test_vllms_extras_reach_the_engine(server):
    extras = {
        "top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True,
        "stop_token_ids": [3], "logit_bias": {"500": -100}, "presence_penalty": 0.1,
        "frequency_penalty": 0.1, "priority": 1, "cache_salt": "a", "return_token_ids": True,
        "prompt_logprobs": 1, "temperature": 0.7, "seed": 3, "user": "u", "best_of": 1,
        "skip_special_tokens": False, "bad_words": ["zzz"], "top_p": 0.9,
    }  # fmt: skip
    (choice,) = complete(server, prompt="import os", **extras)["choices"]
    assert len(choice["token_ids"]) == 8
    assert choice["prompt_logprobs"][0] is None
    assert len(choice["prompt_logprobs"]) == len(choice["prompt_token_ids"])
    banned = complete(server, prompt="import os", allowed_token_ids=[600], return_token_ids=True)
    assert set(banned["choices"][0]["token_ids"]) == {600}


def test_what_is_not_asked_for_is_what_the_checkpoint_says(server):
    defaults = server.host.llm.defaults.params()
    assert (defaults.temperature, defaults.top_p) == (0.8, 0.95)
    request = {"prompt": "import", "seed": 9, "max_tokens": 12, "model": "demo"}
    implicit = server.post("/v1/completions", **request).json()["choices"][0]["text"]
    explicit = complete(server, **request, temperature=0.8, top_p=0.95)["choices"][0]["text"]
    assert implicit == explicit
    assert SamplingParams().temperature != 0.8
