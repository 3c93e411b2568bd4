"""Prompts and conversations of requests become token ids, long ones beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..async_llm import AsyncLLM
from ..chat import chat_prompts
from ..prompts import Prompt, check_prompt, read_prompts
from .chat_message import with_path
from .config import ServerConfig
from .errors import ApiError, invalid
from .parsing import template_messages

T = TypeVar("T")
# Some milliseconds of tokenizing, which would be a stall of every stream.
_LONG_CHARACTERS = 20_000


def count_prompts(prompt: Any) -> int:
    """How many prompts a request has, before anything is done for them."""
    return 1 if isinstance(prompt, str) or _is_flat(prompt) else max(1, len(prompt))


async def completion_prompts(
    llm: AsyncLLM,
    prompt: Any,
    config: ServerConfig,
    add_special_tokens: bool | None = None,
    field: str = "prompt",
) -> list[Prompt]:
    """The prompts of a request: one text, one list of token ids, or a list of either.

    field: what the request calls them.

    Raises:
        InvalidRequestError: one of them cannot be served.
        ApiError: there are too many, or one is longer than this server takes.
    """
    items = [prompt] if isinstance(prompt, str) or _is_flat(prompt) else prompt
    if not items:
        raise invalid(f"{field} is an empty list; give at least one prompt", field)
    if len(items) > config.max_prompts:
        raise invalid(
            f"{field} has {len(items)} prompts; this server takes {config.max_prompts} at a time",
            field,
        )

    def read() -> list[Prompt]:
        if add_special_tokens is None:
            return read_prompts(items, llm.tokenizer)
        return [_with_special_tokens(llm.tokenizer, item, add_special_tokens) for item in items]

    characters = sum(len(item) for item in items if isinstance(item, str))
    prompts = await _beside(read, characters)
    for index, one in enumerate(prompts):
        check_prompt(one, index, llm.vocab_size, llm.max_model_len)
        _check_length(one, config, field)
    return prompts


async def chat_prompt(
    llm: AsyncLLM,
    messages: list[dict[str, Any]],
    config: ServerConfig,
    *,
    add_generation_prompt: bool = True,
    chat_template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Prompt:
    """The prompt of a conversation, by the chat template.

    Raises:
        InvalidRequestError: the template refuses, or the prompt is too long.
        ApiError: a message has parts that are no text.
    """
    if chat_template is not None and not config.trust_request_chat_template:
        raise invalid(
            "chat_template in a request is not allowed on this server; start it with "
            "--trust-request-chat-template",
            "chat_template",
        )
    template = chat_template or getattr(llm.tokenizer, "chat_template", None)
    conversation = with_path(template_messages, messages, template)

    def render() -> dict[str, Any]:
        return chat_prompts(
            llm.tokenizer, conversation, add_generation_prompt, chat_template, template_kwargs
        )[0]

    made = await _beside(render, sum(len(str(m.get("content"))) for m in conversation))
    prompt = Prompt(made["prompt"], made["prompt_token_ids"])
    check_prompt(prompt, 0, llm.vocab_size, llm.max_model_len)
    _check_length(prompt, config, "messages")
    return prompt


def _is_flat(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)


def _with_special_tokens(tokenizer: Any, item: Any, flag: bool) -> Prompt:
    if not isinstance(item, str):
        return Prompt(None, list(item))
    if tokenizer is None:
        raise invalid("the prompt is text, but this server has no tokenizer; send token ids")
    try:
        return Prompt(item, list(tokenizer(item, add_special_tokens=flag)["input_ids"]))
    except (TypeError, UnicodeError) as error:
        raise invalid(f"the prompt is not valid Unicode: {error}", "prompt") from error


def _check_length(prompt: Prompt, config: ServerConfig, param: str) -> None:
    most = config.max_prompt_tokens
    if most is not None and len(prompt.token_ids) > most:
        raise ApiError(
            400,
            f"prompt is too long: it has {len(prompt.token_ids)} tokens, and this model's maximum "
            f"context length is {most} on this server, output not counted; send fewer",
            param=param,
            code="context_length_exceeded",
        )


async def _beside(work: Callable[[], T], characters: int) -> T:
    """What `work` returns; in a thread if it has much to do."""
    return work() if characters < _LONG_CHARACTERS else await asyncio.to_thread(work)
