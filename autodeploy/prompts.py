"""Prompts as users write them, checked as a whole before any is submitted."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .errors import (
    ConfigError,
    EmptyPromptError,
    InvalidRequestError,
    PromptTooLongError,
    UnknownTokenError,
)
from .runtime.sampling_params import SamplingParams


@dataclass(frozen=True)
class Prompt:
    """One prompt, tokenized."""

    text: str | None
    token_ids: list[int]
    prefilled: int | None = None
    """Leading tokens that were the prompt, if the others have been generated since; None: all."""


def read_prompts(prompts: Any, tokenizer: Any) -> list[Prompt]:
    """Prompts from a string, token ids, a dict with either, or a sequence of those.

    Raises:
        InvalidRequestError: one is none of these, or text comes without a tokenizer.
    """
    return [_read(p, index, tokenizer) for index, p in enumerate(_as_list(prompts))]


def _as_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if hasattr(prompts, "tolist"):
        prompts = prompts.tolist()
    if not isinstance(prompts, Sequence):
        raise InvalidRequestError(
            "prompts must be text, token ids, a dict or a list of those, not "
            f"{type(prompts).__name__}"
        )
    # A list of integers is one prompt of token ids.
    if prompts and all(_is_integer(p) for p in prompts):
        return [list(prompts)]
    return list(prompts)


def _read(prompt: Any, index: int, tokenizer: Any) -> Prompt:
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, Mapping):
        keys = set(prompt)
        if keys not in ({"prompt"}, {"prompt_token_ids"}, {"prompt", "prompt_token_ids"}):
            raise InvalidRequestError(
                f"prompt {index}: a dict takes 'prompt' or 'prompt_token_ids', not "
                f"{', '.join(sorted(map(str, keys))) or 'nothing'}"
            )
        if not isinstance(prompt.get("prompt", ""), str):
            raise InvalidRequestError(
                f"prompt {index}: 'prompt' must be text, not {type(prompt['prompt']).__name__}; "
                "give token ids as 'prompt_token_ids'"
            )
        if "prompt_token_ids" in prompt:
            return Prompt(prompt.get("prompt"), _token_ids(prompt["prompt_token_ids"], index))
        prompt = prompt["prompt"]
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InvalidRequestError(
                f"prompt {index} is text, but there is no tokenizer: pass tokenizer=... to deploy, "
                "or give token ids"
            )
        try:
            return Prompt(prompt, list(tokenizer(prompt)["input_ids"]))
        except (TypeError, UnicodeError) as error:
            # Half of a surrogate pair is a Python string but no Unicode text.
            raise InvalidRequestError(
                f"prompt {index} cannot be tokenized, it is not valid Unicode: {error}"
            ) from error
    return Prompt(None, _token_ids(prompt, index))


def _token_ids(value: Any, index: int) -> list[int]:
    ids = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(ids, list) and set(map(type, ids)) <= {int}:
        return list(ids)  # the usual case, without a look at each
    if not isinstance(ids, (list, tuple)) or not all(_is_integer(i) for i in ids):
        shown = f"{ids!r:.60}"
        raise InvalidRequestError(
            f"prompt {index} is neither text nor a flat list of integers, but {shown}"
        )
    return [operator.index(i) for i in ids]


def _is_integer(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool) and not _is_array(value)


def _is_array(value: Any) -> bool:
    return len(getattr(value, "shape", ())) > 0


@contextmanager
def refusals_name_prompt(index: int) -> Iterator[None]:
    """Puts the number of the prompt before the message of what refuses it."""
    try:
        yield
    except InvalidRequestError as error:
        raise type(error)(f"prompt {index}: {error}") from error


def check_prompt(prompt: Prompt, index: int, vocab_size: int, max_model_len: int) -> None:
    """Raises the specific InvalidRequestError if the engine would refuse the prompt."""
    ids = prompt.token_ids
    if not ids:
        raise EmptyPromptError(f"prompt {index} has no tokens; give at least one")
    if len(ids) >= max_model_len:
        # LangChain knows such errors by "prompt is too long", LiteLLM by "this model's ... is".
        raise PromptTooLongError(
            f"prompt is too long: prompt {index} has {len(ids)} tokens, and this model's maximum "
            f"context length is {max_model_len}, prompt and output together; use at most "
            f"{max_model_len - 1} or raise max_model_len"
        )
    if min(ids) < 0 or max(ids) >= vocab_size:
        bad = next(i for i in ids if not 0 <= i < vocab_size)
        raise UnknownTokenError(
            f"prompt {index}: token id {bad} is outside the vocabulary; use 0 to {vocab_size - 1}"
        )


def require_task(asked: str, task: str) -> None:
    """Raises InvalidRequestError if the model was deployed for something else than is asked."""
    if asked == "embed" != task:
        raise InvalidRequestError(
            "this model was deployed to generate; for embeddings deploy it with task='embed' "
            "(autodeploy serve MODEL --task embed)"
        )
    if asked != task:
        raise InvalidRequestError(
            "this model was deployed with task='embed' and has no head to generate with; deploy "
            "it without"
        )


def params_for_each(params: Any, count: int, default: SamplingParams) -> list[SamplingParams]:
    """One SamplingParams per prompt, from None, one, or a list.

    Raises:
        ConfigError: a list of another length, or something else.
    """
    if params is None:
        return [default.clone() for _ in range(count)]
    if isinstance(params, SamplingParams):
        return [params.clone() for _ in range(count)]
    if not isinstance(params, Sequence) or not all(isinstance(p, SamplingParams) for p in params):
        raise ConfigError("sampling_params must be a SamplingParams or a list of them")
    if len(params) != count:
        raise ConfigError(f"{count} prompts, but {len(params)} SamplingParams; give one for each")
    return [p.clone() for p in params]
