"""Embeddings: one vector per prompt, of what a model's head would have read.

A model deployed with task='embed' has no head (`cut_head`): the engine computes its prompts as it
computes all prompts, and answers with the state of the last token, or the mean over all of them.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .errors import InvalidRequestError, RecipeError
from .outputs import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    RequestOutput,
)
from .pooling import POOLINGS, Pooling
from .runtime.sampling_params import SamplingParams
from .transforms.recipe import Recipe, Step, check_order
from .transforms.transform import TRANSFORMS


def embedding_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the same model without its head.

    Raises:
        RecipeError: it has no step `cache` to cut the head behind.
    """
    names = [step.transform.name for step in recipe.steps]
    if "cut_head" in names:
        return recipe
    if "cache" not in names:
        raise RecipeError(
            f"task='embed' cuts the head behind the step 'cache', which recipe '{recipe.name}' "
            "does not have; add it"
        )
    at = names.index("cache") + 1
    cut = Step("cut_head", TRANSFORMS["cut_head"](), expect=1)
    steps = (*recipe.steps[:at], cut, *recipe.steps[at:])
    check_order(recipe.name, steps)
    return dataclasses.replace(recipe, steps=steps)


def embedding_params(pooling: Pooling) -> SamplingParams:
    """What the engine is asked with.

    Raises:
        InvalidRequestError: there is no such pooling.
    """
    if pooling not in POOLINGS:
        raise InvalidRequestError(f"pooling must be {' or '.join(POOLINGS)}, not {pooling!r:.60}")
    # The mean needs the rows that scores of the prompt would be made of.
    rows = 0 if pooling == "mean" else None
    return SamplingParams(max_tokens=1, temperature=0, detokenize=False, prompt_logprobs=rows)


def vector_of(
    output: RequestOutput, normalize: bool = True, dimensions: int | None = None
) -> np.ndarray:
    """The embedding [D] float32 of a finished prompt.

    normalize: to length 1, after all but the first `dimensions` numbers are dropped.

    Raises:
        InvalidRequestError: `dimensions` is not from 1 to the model's width.
    """
    assert output.embedding is not None, "the prompt was not embedded"
    vector = np.frombuffer(output.embedding, dtype="<f4")
    if dimensions is not None:
        if not 1 <= dimensions <= len(vector):
            raise InvalidRequestError(
                f"dimensions must be from 1 to {len(vector)}, the model's width, not {dimensions}"
            )
        vector = vector[:dimensions]
    if normalize:
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
    return vector


def embedded(
    output: RequestOutput, normalize: bool, dimensions: int | None
) -> EmbeddingRequestOutput:
    """What `embed` returns for a finished prompt."""
    return EmbeddingRequestOutput(
        request_id=output.request_id,
        outputs=EmbeddingOutput(vector_of(output, normalize, dimensions).tolist()),
        prompt_token_ids=output.prompt_token_ids,
        num_cached_tokens=output.num_cached_tokens,
    )
