"""POST /v1/responses, and what is kept of it."""

from __future__ import annotations

from typing import Any, Literal

from .base import Answer, Request
from .sampling import TokenFields

Includable = Literal[
    "file_search_call.results", "web_search_call.results", "web_search_call.action.sources",
    "message.input_image.image_url", "computer_call_output.output.image_url",
    "code_interpreter_call.outputs", "reasoning.encrypted_content",
    "message.output_text.logprobs",
]  # fmt: skip
LOGPROBS: Includable = "message.output_text.logprobs"


class TextOptions(Request):
    format: dict[str, Any] | None = None
    """{type: text | json_object | json_schema, ...}, with name and schema beside the type."""
    verbosity: str | None = None
    """Told to nobody."""


class ReasoningOptions(Request):
    effort: str | None = None
    """Passed to the chat template."""
    summary: str | None = None
    """Told to nobody: reasoning is given in full."""
    generate_summary: str | None = None


class ResponseStreamOptions(Request):
    include_obfuscation: bool | None = None
    """OpenAI's padding against listeners who measure packets; we add none."""


class ResponseRequest(TokenFields):
    input: str | list[dict[str, Any]]
    """A text, or items: messages, reasoning, calls of functions and their outputs."""
    instructions: str | None = None
    """A system message in front of the input; one request's, not the conversation's."""
    previous_response_id: str | None = None
    """What the input goes on with: everything up to the end of that response."""
    store: bool | None = None
    """Whether to keep the response for later requests (default: if this server keeps any)."""
    max_output_tokens: int | None = None
    stream_options: ResponseStreamOptions | None = None
    text: TextOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    """auto: items in front are left out if the input is longer than the context."""
    top_logprobs: int | None = None
    include: list[Includable] | None = None

    # What needs services that we do not have; refused if it asks for something.
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    context_management: Any = None
    moderation: Any = None

    # Told to nobody: of OpenAI's bookkeeping, its caches, tools and tariffs.
    metadata: dict[str, str] | None = None
    max_tool_calls: int | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None

    # vLLM's extras.
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def wants_logprobs(self) -> bool:
        return self.top_logprobs not in (None, 0) or LOGPROBS in (self.include or [])


class InputTokensDetails(Answer):
    cached_tokens: int


class OutputTokensDetails(Answer):
    reasoning_tokens: int


class ResponseUsage(Answer):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseObject(Answer):
    """A response: what was asked, as far as it matters, and what came of it."""

    id: str
    object: Literal["response"]
    created_at: int
    """Seconds since 1970."""
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: bool
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, Any]
    safety_identifier: str | None
    service_tier: str
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str
    usage: ResponseUsage | None
    user: str | None


class DeletedResponse(Answer):
    id: str
    object: Literal["response"]
    deleted: bool
