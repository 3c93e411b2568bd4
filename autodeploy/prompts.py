"""Prompts as users write them, checked as a whole before any is submitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def read_prompts(prompts: Any, tokenizer: Any) -> list[Prompt]:
    """Prompts from a string, token ids, a dict with either, or a sequence of those.

    Raises:
        InvalidRequestError: one is none of these, or text comes without a tokenizer.
    """
    return [_read(p, index, tokenizer) for index, p in enumerate(_as_list(prompts))]


def _as_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise InvalidRequestError(
            "prompts must be text, token ids, a dict or a list of those, not "
            f"{type(prompts).__name__}"
        )
    # A list of integers is one prompt of token ids.
    if prompts and all(type(p) is int for p in prompts):
        return [list(prompts)]
    return list(prompts)


def _read(prompt: Any, index: int, tokenizer: Any) -> Prompt:
    if isinstance(prompt, Mapping):
        keys = set(prompt)
        if keys not in ({"prompt"}, {"prompt_token_ids"}, {"prompt", "prompt_token_ids"}):
            raise InvalidRequestError(
                f"prompt {index}: a dict takes 'prompt' or 'prompt_token_ids', not "
                f"{', '.join(sorted(map(str, keys))) or 'nothing'}"
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
        return Prompt(prompt, list(tokenizer(prompt)["input_ids"]))
    return Prompt(None, _token_ids(prompt, index))


def _token_ids(value: Any, index: int) -> list[int]:
    ids = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(ids, (list, tuple)) or any(type(i) is not int for i in ids):
        raise InvalidRequestError(f"prompt {index}: token ids must be a flat list of integers")
    return list(ids)


def check_prompt(prompt: Prompt, index: int, vocab_size: int, max_model_len: int) -> None:
    """Raises the specific InvalidRequestError if the engine would refuse the prompt."""
    ids = prompt.token_ids
    if not ids:
        raise EmptyPromptError(f"prompt {index} has no tokens; give at least one")
    if len(ids) >= max_model_len:
        raise PromptTooLongError(
            f"prompt {index} has {len(ids)} tokens; sequences hold {max_model_len}, prompt and "
            f"output together, so use at most {max_model_len - 1} or raise max_model_len"
        )
    bad = next((i for i in ids if not 0 <= i < vocab_size), None)
    if bad is not None:
        raise UnknownTokenError(
            f"prompt {index}: token id {bad} is outside the vocabulary; use 0 to {vocab_size - 1}"
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
