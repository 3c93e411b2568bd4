"""What every request and answer shares."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Request(BaseModel):
    """A request. Like OpenAI's API it refuses fields it does not know, where vLLM ignores them:
    who misspells `temperature` should hear of it."""

    # strict: "1" is no number, and true is no 1.
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class Answer(BaseModel):
    """An answer. Fields that were not given are left out of the JSON; a given None is null."""


class StreamOptions(Request):
    include_usage: bool = False
    """An event before the last one tells the usage of the whole request."""
    continuous_usage_stats: bool = False
    """Every event tells the usage so far (vLLM's)."""
    include_obfuscation: bool | None = None
    """OpenAI's padding against listeners who measure packets; we add none."""


class PromptTokensDetails(Answer):
    cached_tokens: int


class Usage(Answer):
    """Tokens of a request, over all of its prompts and sequences."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
