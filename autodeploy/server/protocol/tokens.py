"""POST /tokenize and /detokenize, which are vLLM's."""

from __future__ import annotations

from typing import Any

from .base import Answer, Request


class TokenizeRequest(Request):
    """A prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class Tokenized(Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Request):
    model: str | None = None
    tokens: list[int]


class Detokenized(Answer):
    prompt: str
