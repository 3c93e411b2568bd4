"""POST /v1/embeddings of a server with task='embed', and what other servers say to it."""

import base64

import numpy as np
import openai
import pytest
import torch
from running_server import DEMO, RunningServer
from tiny_models import tiny_model

from autodeploy import AsyncLLM
from autodeploy.checkpoint import load_tokenizer

PATH = "/v1/embeddings"
TEXTS = ["import os", "def fib(n):\n    return n", "a"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model("llama", vocab_size=len(tokenizer))


@pytest.fixture(scope="module")
def embedder(model, tokenizer):
    running = RunningServer(AsyncLLM(model, tokenizer=tokenizer, task="embed", max_num_seqs=4))
    yield running
    running.close()


def expected(model, tokenizer, text, pooling="last"):
    with torch.no_grad():
        states = model.base_model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state
    vector = states[0, -1] if pooling == "last" else states[0].mean(0)
    return (vector / vector.norm()).numpy()


def test_texts_have_the_models_own_states(embedder, model, tokenizer):
    answer = embedder.post(PATH, model="demo", input=TEXTS).json()
    assert [each["index"] for each in answer["data"]] == [0, 1, 2]
    for text, each in zip(TEXTS, answer["data"], strict=True):
        assert np.dot(expected(model, tokenizer, text), each["embedding"]) > 0.9999
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_every_form_of_input_gives_the_same(embedder, tokenizer):
    ids = tokenizer(TEXTS[0])["input_ids"]
    vectors = [
        embedder.post(PATH, input=given, encoding_format="float").json()["data"][0]["embedding"]
        for given in (TEXTS[0], [TEXTS[0]], ids, [ids])
    ]
    for vector in vectors[1:]:
        np.testing.assert_allclose(vector, vectors[0], rtol=1e-4, atol=1e-6)
    packed = embedder.post(PATH, input=ids, encoding_format="base64").json()["data"][0]["embedding"]
    found = np.frombuffer(base64.b64decode(packed), dtype="<f4")
    np.testing.assert_allclose(found, vectors[0], rtol=1e-4, atol=1e-6)


def test_fewer_dimensions_are_the_leading_ones_made_long_again(embedder):
    whole, short = (
        np.array(embedder.post(PATH, input="a", **fields).json()["data"][0]["embedding"])
        for fields in ({}, {"dimensions": 8})
    )
    np.testing.assert_allclose(short, whole[:8] / np.linalg.norm(whole[:8]), rtol=1e-4)


def test_the_mean_is_taken_where_the_server_says_so(embedder, model, tokenizer, monkeypatch):
    monkeypatch.setattr(embedder.service.config, "pooling", "mean")
    (each,) = embedder.post(PATH, input=TEXTS[1]).json()["data"]
    assert np.dot(expected(model, tokenizer, TEXTS[1], "mean"), each["embedding"]) > 0.9999


async def test_openais_client_gets_vectors(embedder, model, tokenizer):
    with openai.OpenAI(base_url=f"{embedder.url}/v1", api_key="none", max_retries=0) as client:
        data = client.embeddings.create(model="demo", input=TEXTS).data
        floats = client.embeddings.create(model="demo", input=TEXTS, encoding_format="float").data
    async with openai.AsyncOpenAI(base_url=f"{embedder.url}/v1", api_key="none") as client:
        again = (await client.embeddings.create(model="demo", input=TEXTS, dimensions=64)).data
    for text, one, other, third in zip(TEXTS, data, floats, again, strict=True):
        for found in (one, other, third):
            assert np.dot(expected(model, tokenizer, text), found.embedding) > 0.9999


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [1, -1]}, None),
        ({"input": [["a"]]}, "input"),
        ({"input": "a", "dimensions": 0}, None),
        ({"input": "a", "dimensions": 65}, None),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "stream": True}, "stream"),
        ({"input": ["a"] * 2000}, "input"),
        ({"input": [5] * 2000}, None),
    ],
)
def test_what_cannot_be_embedded_is_a_400(embedder, fields, param):
    answer = embedder.post(PATH, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_each_kind_of_server_says_how_to_get_the_other(server, embedder):
    answer = server.post(PATH, input="a")
    assert answer.status_code == 400
    assert "--task embed" in answer.json()["error"]["message"]
    for path, fields in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/completions", {"prompt": "a", "stream": True}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        answer = embedder.post(path, **fields)
        assert answer.status_code == 400
        assert "deploy it without" in answer.json()["error"]["message"]


def test_embeddings_are_counted(embedder):
    before = metric(embedder, "vllm:prompt_tokens_total")
    finished = metric(embedder, 'finished_reason="stop"')
    used = embedder.post(PATH, input=TEXTS).json()["usage"]["prompt_tokens"]
    assert metric(embedder, "vllm:prompt_tokens_total") == before + used
    assert metric(embedder, 'finished_reason="stop"') == finished + len(TEXTS)


def test_prompts_of_a_request_are_divided_between_replicas(model, tokenizer, embedder):
    engines = [AsyncLLM(model, tokenizer=tokenizer, task="embed", max_num_seqs=4) for _ in range(2)]
    running = RunningServer(*engines)
    try:
        texts = [f"{number} apples" for number in range(8)]
        answers = [one.post(PATH, input=texts).json() for one in (running, embedder)]
        vectors = [[each["embedding"] for each in answer["data"]] for answer in answers]
        np.testing.assert_allclose(*vectors, atol=1e-4)
        for engine in "01":
            assert metric(running, "vllm:request_success_total", f'engine="{engine}"') == 4
            assert metric(running, "vllm:prompt_tokens_total", f'engine="{engine}"') > 0
        used = answers[0]["usage"]["prompt_tokens"]
        assert metric(running, "vllm:prompt_tokens_total") == used
    finally:
        running.close()


def metric(server, *words):
    """The sum of the samples whose lines have all the words."""
    lines = server.client.get("/metrics").text.splitlines()
    told = [line for line in lines if line[0] != "#" and all(word in line for word in words)]
    return sum(float(line.split()[-1]) for line in told)
