"""POST /v1/completions."""

from __future__ import annotations

from typing import Any, Literal

from .base import Answer, Usage
from .sampling import SamplingFields


class CompletionRequest(SamplingFields):
    prompt: str | list[str] | list[int] | list[list[int]]
    """A text, texts, token ids, or a list of token ids per prompt."""
    logprobs: int | None = None
    """Candidates per token, besides the sampled one."""
    echo: bool | None = None
    """The prompt comes before the text, with its logprobs if logprobs are asked for."""
    suffix: str | None = None
    add_special_tokens: bool | None = None
    """Whether tokens such as the one that begins a sequence are put around a text (default: as
    the tokenizer does)."""


class CompletionLogprobs(Answer):
    """Parallel lists, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]
    """Where a token's text begins, in characters of the choice's text."""


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class Completion(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    """Seconds since 1970."""
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
