"""POST /v1/chat/completions: a conversation in, its next message out."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import Response

from ..outputs import CompletionOutput, RequestOutput
from .answers import TextEvents, event
from .chat_message import MessageReader, options_of, parser_of
from .errors import invalid
from .generation import Generation, UsageCount
from .logprobs import chat_logprobs, prompt_logprobs
from .prompt_input import chat_prompt
from .protocol.chat import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatRequest,
    Message,
)
from .protocol.sampling import check_logprobs
from .service import Service, service_of
from .structured import asked_form, constrained, demanding_a_call, field_of

router = APIRouter()


@router.post(
    "/v1/chat/completions", responses={200: {"model": ChatCompletion}}, response_model=None
)
async def chat_completions(
    request: ChatRequest, service: Annotated[Service, Depends(service_of)]
) -> Response:
    """Answers a conversation `n` times."""
    call = _Call(request, service)
    return service.stream(call.events()) if request.stream else service.whole(call.answer())


class _Call:
    """One request to the endpoint."""

    def __init__(self, request: ChatRequest, service: Service) -> None:
        self.request = request
        self.service = service
        self.model = service.model_name(request.model)
        self.llm = service.host.living()
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        request.check_limits(service.config)
        check_logprobs("top_logprobs", request.top_logprobs, service.config)
        _refuse_contradictions(request)
        self.tools = options_of(request, service.formats)
        self.parser = parser_of(self.tools, service.formats)
        changes: dict[str, Any] = {}
        if request.logprobs:
            changes["logprobs"] = request.top_logprobs or 0
        # The newer name wins, and a message without a limit goes on to the end of the context.
        limit = request.max_completion_tokens or request.max_tokens
        defaults = self.llm.defaults
        if limit is not None or "max_tokens" not in defaults.sampling:
            changes["max_tokens"] = limit
        params = request.sampling_params(defaults.params(), **changes)
        form = asked_form(request, request.response_format)
        params = demanding_a_call(params, self.tools, form)
        if self.parser.needs_special_tokens(getattr(self.llm.tokenizer, "all_special_tokens", ())):
            params = params.clone(skip_special_tokens=False)
        self.params = constrained(params, form)
        self.form_field = field_of(form)
        self.tells_text_only = not (
            request.logprobs or request.return_token_ids or request.tells_usage_always
            or self.llm.tokenizer is None
        )  # fmt: skip
        """Whether events in the middle of a plain answer have nothing but text."""
        self._text_events: dict[int, TextEvents] = {}

    async def answer(self) -> ChatCompletion:
        with self.service.admission.sequences(self.request.sequences_per_prompt):
            generation = await self._generation()
            (output,) = await generation.whole()
        count = UsageCount(generation.prompts)
        count.add(0, output)
        answer = ChatCompletion(
            id=self.id, object="chat.completion", created=self.created, model=self.model,
            choices=[self._choice(part, generation) for part in output.outputs],
            usage=count.usage(),
        )  # fmt: skip
        if self.request.prompt_logprobs is not None and output.prompt_logprobs:
            answer.prompt_logprobs = prompt_logprobs(output.prompt_logprobs)
        if self.request.return_token_ids:
            answer.prompt_token_ids = output.prompt_token_ids
        return answer

    async def events(self) -> AsyncGenerator[bytes, None]:
        with self.service.admission.sequences(self.request.sequences_per_prompt):
            generation = await self._generation()
            count = UsageCount(generation.prompts)
            readers: dict[int, MessageReader] = {}
            async with aclosing(generation.deltas()) as deltas:
                async for _, delta in deltas:
                    if not readers:
                        for index in range(self.request.sequences_per_prompt):
                            readers[index] = self._reader(generation)
                            yield event(self._opening(index, delta, count))
                    count.add(0, delta)
                    for part in delta.outputs:
                        reader = readers[part.index]
                        if reader.is_plain and self.tells_text_only and not part.finished:
                            if part.text:
                                yield self._text_event(part, count)
                            continue
                        choice = self._piece(reader, part)
                        if choice is not None:
                            yield event(self._chunk([choice], count))
            if self.request.tells_usage:
                last = self._chunk([], count)
                last.usage = count.usage()
                yield event(last)

    def _text_event(self, part: CompletionOutput, count: UsageCount) -> bytes:
        if part.index not in self._text_events:
            choice = ChatChunkChoice(
                index=part.index, delta=Message(content=TextEvents.TEXT), logprobs=None,
                finish_reason=None,
            )  # fmt: skip
            self._text_events[part.index] = TextEvents(self._chunk([choice], count))
        return self._text_events[part.index].event(part.text)

    def _reader(self, generation: Generation) -> MessageReader:
        prompt = generation.prompts[0].text or ""
        return MessageReader(self.parser, prompt, self.tools.named is not None)

    def _choice(self, part: CompletionOutput, generation: Generation) -> ChatChoice:
        reader = self._reader(generation)
        message = reader.whole(part.text)
        choice = ChatChoice(
            index=part.index, message=message, logprobs=self._logprobs(part),
            finish_reason=reader.finish_reason(part.finish_reason), stop_reason=part.stop_reason,
        )  # fmt: skip
        if self.request.return_token_ids:
            choice.token_ids = part.token_ids
        return choice

    def _opening(self, index: int, delta: RequestOutput, count: UsageCount) -> ChatChunk:
        """The first event of a sequence: who speaks."""
        choice = ChatChunkChoice(
            index=index, delta=Message(role="assistant", content=""), logprobs=None,
            finish_reason=None,
        )  # fmt: skip
        chunk = self._chunk([choice], count)
        if self.request.return_token_ids:
            chunk.prompt_token_ids = delta.prompt_token_ids
        return chunk

    def _piece(self, reader: MessageReader, part: CompletionOutput) -> ChatChunkChoice | None:
        """What a delta says; None if that is nothing yet."""
        message = reader.add(part.text, part.finished)
        tells_tokens = (
            self.request.logprobs or self.request.return_token_ids or self.llm.tokenizer is None
        )
        if message is None and not part.finished and not tells_tokens:
            return None
        choice = ChatChunkChoice(
            index=part.index, delta=message or Message(), logprobs=self._logprobs(part),
            finish_reason=reader.finish_reason(part.finish_reason),
        )  # fmt: skip
        if part.finished:
            choice.stop_reason = part.stop_reason
        if self.request.return_token_ids:
            choice.token_ids = part.token_ids
        return choice

    def _chunk(self, choices: list[ChatChunkChoice], count: UsageCount) -> ChatChunk:
        chunk = ChatChunk(
            id=self.id, object="chat.completion.chunk", created=self.created, model=self.model,
            choices=choices,
        )  # fmt: skip
        if self.request.tells_usage:
            chunk.usage = count.usage() if self.request.tells_usage_always else None
        return chunk

    def _logprobs(self, part: CompletionOutput) -> Any:
        if not self.request.logprobs:
            return None
        return chat_logprobs(part.logprobs, self.request.top_logprobs or 0)

    async def _generation(self) -> Generation:
        request = self.request
        prompt = await chat_prompt(
            self.llm,
            request.messages,
            self.service.config,
            add_generation_prompt=request.add_generation_prompt,
            chat_template=request.chat_template,
            template_kwargs=_template_kwargs(request, self.tools.for_template()),
        )
        return Generation(
            self.service.host,
            self.service.metrics,
            self.id,
            [prompt],
            self.params,
            request.priority,
            request.cache_salt,
            form_field=self.form_field,
        )


def _refuse_contradictions(request: ChatRequest) -> None:
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs is allowed only with logprobs=true", "top_logprobs")
    if request.modalities not in (None, ["text"]):
        raise invalid("modalities: this model writes text only", "modalities")
    if request.add_generation_prompt and request.continue_final_message:
        raise invalid(
            "continue_final_message goes on with the last message, and add_generation_prompt "
            "begins another; set add_generation_prompt=false",
            "continue_final_message",
        )


def _template_kwargs(request: ChatRequest, tools: list[Any] | None) -> dict[str, Any]:
    """What the template is given besides the messages; what was not asked for is left out."""
    named = {
        "tools": tools,
        "documents": request.documents,
        "reasoning_effort": request.reasoning_effort,
        "continue_final_message": request.continue_final_message or None,
    }
    given = {name: value for name, value in named.items() if value is not None}
    return {**given, **(request.chat_template_kwargs or {})}
