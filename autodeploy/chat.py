"""Conversations become prompts by the tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2.exceptions import TemplateError

from .errors import InvalidRequestError


def chat_prompts(
    tokenizer: Any,
    messages: Any,
    add_generation_prompt: bool = True,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Prompts with text and token ids of one conversation or of a list of them.

    Raises:
        InvalidRequestError: no tokenizer, no template, wrong messages, or the template refuses.
    """
    if tokenizer is None:
        raise InvalidRequestError("chat needs a tokenizer: pass tokenizer=... to deploy")
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise InvalidRequestError(
            "the tokenizer has no chat template; pass chat_template=..., or use generate"
        )
    prompts = []
    for conversation in _conversations(messages):
        try:
            text = tokenizer.apply_chat_template(
                conversation,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                chat_template=chat_template,
                **(chat_template_kwargs or {}),
            )
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        except (TemplateError, TypeError, ValueError) as error:
            # Content of a type the template does not expect, text that is not valid Unicode.
            raise InvalidRequestError(f"the chat template refuses: {error}") from error
        prompts.append({"prompt": text, "prompt_token_ids": list(ids)})
    return prompts


def _conversations(messages: Any) -> list[Any]:
    if not isinstance(messages, list) or not messages:
        raise InvalidRequestError("messages must be a list of {'role', 'content'} dicts, not empty")
    conversations = messages if isinstance(messages[0], list) else [messages]
    for conversation in conversations:
        if not isinstance(conversation, list) or not conversation:
            raise InvalidRequestError(
                "a conversation is a list of {'role', 'content'} dicts, not empty, and not "
                f"{conversation!r:.60}"
            )
        for message in conversation:
            if not isinstance(message, Mapping) or "role" not in message:
                raise InvalidRequestError(
                    f"a message is a dict with 'role' and 'content', not {message!r}"
                )
    return conversations
