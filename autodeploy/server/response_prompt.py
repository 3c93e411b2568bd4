"""The prompt of a response: its items under the chat template, cut from the front if so asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..async_llm import AsyncLLM
from ..errors import PromptTooLongError
from ..prompts import Prompt
from .config import ServerConfig
from .errors import ApiError
from .parsing import ToolOptions
from .prompt_input import chat_prompt
from .protocol.responses import ResponseRequest
from .response_items import Item, messages_of, without_first


async def response_prompt(
    llm: AsyncLLM,
    items: Sequence[Item],
    request: ResponseRequest,
    config: ServerConfig,
    tools: ToolOptions,
) -> Prompt:
    """The prompt that all items make; with truncation='auto', as many of the last ones as fit.

    Raises:
        InvalidRequestError: the template refuses, or the prompt is too long.
        ApiError: an item is wrong or no text.
    """
    given = _Given(llm, request.instructions, config, _template_kwargs(request, tools))
    try:
        return await given.prompt(items)
    except (PromptTooLongError, ApiError) as error:
        if request.truncation != "auto" or not _is_too_long(error):
            raise
    most = llm.max_model_len
    # A prompt that just fits would leave no room to answer.
    most -= min(request.max_output_tokens or most // 4, most // 2)
    fewest, enough = 1, len(items) - 1
    while fewest < enough:
        middle = (fewest + enough) // 2
        kept = without_first(items, middle)
        # Nothing is kept of a long output whose call is dropped; nor of more.
        if not kept or await given.fits(kept, most):
            enough = middle
        else:
            fewest = middle + 1
    return await given.prompt(without_first(items, enough) or items)


class _Given:
    """What is the same for every choice of items."""

    def __init__(
        self, llm: AsyncLLM, instructions: str | None, config: ServerConfig, kwargs: dict[str, Any]
    ) -> None:
        self._llm = llm
        self._instructions = instructions
        self._config = config
        self._kwargs = kwargs

    async def prompt(self, items: Sequence[Item]) -> Prompt:
        messages = messages_of(items, self._instructions)
        try:
            return await chat_prompt(
                self._llm, messages, self._config, template_kwargs=self._kwargs
            )
        except ApiError as error:
            if (error.param or "").startswith("messages"):
                error.param = "input"
            raise

    async def fits(self, items: Sequence[Item], most: int) -> bool:
        try:
            return len((await self.prompt(items)).token_ids) <= most
        except (PromptTooLongError, ApiError) as error:
            if not _is_too_long(error):
                raise
            return False


def _is_too_long(error: Exception) -> bool:
    return isinstance(error, PromptTooLongError) or (
        isinstance(error, ApiError) and error.code == "context_length_exceeded"
    )


def _template_kwargs(request: ResponseRequest, tools: ToolOptions) -> dict[str, Any]:
    """What the template is given besides the messages; what was not asked for is left out."""
    named: Mapping[str, Any] = {
        "tools": tools.for_template(),
        "reasoning_effort": request.reasoning and request.reasoning.effort,
    }
    given = {name: value for name, value in named.items() if value is not None}
    return {**given, **(request.chat_template_kwargs or {})}
