"""Embeddings are what transformers' own hidden states give, however the prompts are computed."""

import asyncio

import numpy as np
import pytest
import torch
from held_pages import pages_used
from tiny_models import tiny_model

from autodeploy import AsyncLLM, deploy
from autodeploy.embedding import embedding_recipe
from autodeploy.errors import (
    ConfigError,
    InvalidRequestError,
    PromptTooLongError,
    RecipeError,
    UnsupportedModelError,
)
from autodeploy.transforms.recipe import load_recipe

PROMPTS = [[5, 9, 31], [7] * 40 + [8, 9], [11], list(range(3, 90))]


def expected(model, ids, pooling):
    with torch.no_grad():
        states = model.base_model(torch.tensor([ids])).last_hidden_state[0].float()
    vector = states[-1] if pooling == "last" else states.mean(0)
    return (vector / vector.norm()).numpy()


def check(llm, model, **options):
    for pooling in ("last", "mean"):
        found = llm.embed(PROMPTS, pooling=pooling, **options)
        for ids, output in zip(PROMPTS, found, strict=True):
            cosine = float(np.dot(expected(model, ids, pooling), output.outputs.embedding))
            assert cosine > 0.9999, (pooling, len(ids))
            assert output.prompt_token_ids == ids


@pytest.fixture(scope="module")
def embedder(model, tokenizer):
    with deploy(
        model, tokenizer=tokenizer, task="embed", max_num_seqs=3, max_num_batched_tokens=24
    ) as deployed:
        yield deployed


def test_a_prompt_in_pieces_has_the_models_own_states(embedder, model):
    check(embedder, model)
    check(embedder, model)  # from the prefix cache
    assert embedder.embed([PROMPTS[3]])[0].num_cached_tokens > 0
    assert pages_used(embedder) == 0
    assert embedder.summary["transforms"].count("cut_head 1") == 1


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere", "gpt2", "mamba2", "falcon_h1"])
def test_scaled_and_capped_logits_leave_no_trace(name):
    model = tiny_model(name)
    with deploy(model, task="embed", max_num_seqs=2, max_num_batched_tokens=32) as llm:
        check(llm, model)


def test_few_pages_and_preemption_change_nothing(model):
    with deploy(model, task="embed", max_num_seqs=4, num_pages=9, max_num_batched_tokens=16) as llm:
        check(llm, model)


def test_leading_numbers_alone_and_lengths(embedder):
    whole = np.array(embedder.embed([PROMPTS[0]], normalize=False)[0].outputs.embedding)
    short = np.array(embedder.embed([PROMPTS[0]], dimensions=8)[0].outputs.embedding)
    assert len(whole) == 64
    np.testing.assert_allclose(short, whole[:8] / np.linalg.norm(whole[:8]), rtol=1e-5)
    for dimensions in (0, 65):
        with pytest.raises(InvalidRequestError, match="from 1 to 64"):
            embedder.embed([PROMPTS[0]], dimensions=dimensions)


def test_text_is_tokenized_as_for_generating(embedder, tokenizer):
    (by_text,) = embedder.embed("def add")
    (by_ids,) = embedder.embed([tokenizer("def add")["input_ids"]])
    assert by_text.outputs == by_ids.outputs


def test_each_task_says_how_to_get_the_other(embedder, llm):
    with pytest.raises(InvalidRequestError, match="deploy it without"):
        embedder.generate("a")
    with pytest.raises(InvalidRequestError, match="task='embed'"):
        llm.embed("a")
    with pytest.raises(InvalidRequestError, match="pooling must be last or mean"):
        embedder.embed("a", pooling="first")
    with pytest.raises(PromptTooLongError):
        embedder.embed([[5] * 1000])


def test_what_cannot_embed_is_refused_before_it_serves(model):
    with pytest.raises(ConfigError, match="verify compares logits"):
        deploy(model, task="embed", verify=True)
    with pytest.raises(ConfigError, match="task must be one of"):
        deploy(model, task="rerank")
    with pytest.raises(RecipeError, match="'cache'"):
        embedding_recipe(load_recipe({"steps": ["canonicalize"]}))
    recipe = embedding_recipe(load_recipe("default"))
    assert embedding_recipe(load_recipe(recipe.to_dict())).to_yaml() == recipe.to_yaml()


def test_a_model_on_a_lower_rung_is_refused_with_the_cause(monkeypatch, model):
    from autodeploy import ladder
    from autodeploy.errors import CaptureError

    def fail(*args, **options):
        raise CaptureError("it cannot be captured")

    monkeypatch.setattr(ladder, "capture_proved", fail)
    with pytest.raises(UnsupportedModelError, match="it cannot be captured"):
        deploy(model, task="embed")


async def test_async_embeddings_run_together_and_can_be_left(model, tokenizer):
    async with AsyncLLM(model, tokenizer=tokenizer, task="embed", max_num_seqs=4) as llm:
        assert llm.task == "embed"
        outputs = await asyncio.gather(*(llm.embed([ids], pooling="mean") for ids in PROMPTS))
        for ids, output in zip(PROMPTS, outputs, strict=True):
            assert np.dot(expected(model, ids, "mean"), output.outputs.embedding) > 0.9999
        task = asyncio.create_task(llm.embed([PROMPTS[3]]))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        with pytest.raises(InvalidRequestError, match="deploy it without"):
            async for _ in llm.generate("a"):
                pass
