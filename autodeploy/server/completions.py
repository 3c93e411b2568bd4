"""POST /v1/completions: texts or token ids in, their continuations out."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import Response

from ..detokenizer import decode
from ..outputs import CompletionOutput, Logprob, RequestOutput
from ..prompts import Prompt
from .answers import TextEvents, event
from .errors import invalid
from .generation import Generation, UsageCount
from .logprobs import completion_logprobs, prompt_logprobs
from .prompt_input import completion_prompts, count_prompts
from .protocol.completions import Completion, CompletionChoice, CompletionRequest
from .protocol.sampling import check_logprobs
from .service import Service, service_of
from .structured import asked_form, constrained, field_of

router = APIRouter()


@router.post("/v1/completions", responses={200: {"model": Completion}}, response_model=None)
async def completions(
    request: CompletionRequest, service: Annotated[Service, Depends(service_of)]
) -> Response:
    """Continues each prompt `n` times."""
    call = _Call(request, service)
    return service.stream(call.events()) if request.stream else service.whole(call.answer())


class _Call:
    """One request to the endpoint."""

    def __init__(self, request: CompletionRequest, service: Service) -> None:
        self.request = request
        self.service = service
        self.model = service.model_name(request.model)
        self.llm = service.host.living()
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        request.check_limits(service.config)
        check_logprobs("logprobs", request.logprobs, service.config)
        if request.suffix:
            raise invalid("suffix is not served: the model only continues a text", "suffix")
        self.drops_output = request.max_tokens == 0 and bool(request.echo)
        changes: dict[str, Any] = {"logprobs": request.logprobs}
        if self.drops_output:
            changes["max_tokens"] = 1
        if request.echo and request.logprobs is not None:
            changes["prompt_logprobs"] = max(request.logprobs, request.prompt_logprobs or 0)
        params = request.sampling_params(self.llm.defaults.params(), **changes)
        form = asked_form(request, request.response_format)
        self.params = constrained(params, form)
        self.form_field = field_of(form)
        self.silent: frozenset[int] = frozenset()
        if request.logprobs is not None and self.params.skip_special_tokens:
            self.silent = frozenset(getattr(self.llm.tokenizer, "all_special_ids", ()))

    async def answer(self) -> Completion:
        with self.service.admission.sequences(self._sequences()):
            generation = await self._generation()
            outputs = await generation.whole()
        count = UsageCount(generation.prompts)
        choices = []
        for index, output in enumerate(outputs):
            if not self.drops_output:
                count.add(index, output)
            first = index * self.request.sequences_per_prompt
            for part in output.outputs:
                writer = _Writer(self, output.prompt_token_ids)
                choices.append(writer.choice(first + part.index, output, part))
        return Completion(
            id=self.id, object="text_completion", created=self.created, model=self.model,
            choices=choices, usage=count.usage(),
        )  # fmt: skip

    async def events(self) -> AsyncGenerator[bytes, None]:
        with self.service.admission.sequences(self._sequences()):
            generation = await self._generation()
            count = UsageCount(generation.prompts)
            writers: dict[int, _Writer] = {}
            async with aclosing(generation.deltas()) as deltas:
                async for index, delta in deltas:
                    if not self.drops_output:
                        count.add(index, delta)
                    for part in delta.outputs:
                        number = index * self.request.sequences_per_prompt + part.index
                        if number not in writers:
                            writers[number] = _Writer(self, delta.prompt_token_ids)
                        writer = writers[number]
                        if writer.says_text_only(part):
                            if part.text:
                                yield writer.text_event(number, part.text, count)
                        elif writer.has_news(part):
                            yield event(self.chunk([writer.choice(number, delta, part)], count))
            if self.request.tells_usage:
                last = self.chunk([], count)
                last.usage = count.usage()
                yield event(last)

    def chunk(self, choices: list[CompletionChoice], count: UsageCount) -> Completion:
        chunk = Completion(
            id=self.id, object="text_completion", created=self.created, model=self.model,
            choices=choices,
        )  # fmt: skip
        if self.request.tells_usage:
            chunk.usage = count.usage() if self.request.tells_usage_always else None
        return chunk

    def _sequences(self) -> int:
        return self.request.sequences_per_prompt * count_prompts(self.request.prompt)

    async def _generation(self) -> Generation:
        request = self.request
        prompts = await completion_prompts(
            self.llm, request.prompt, self.service.config, request.add_special_tokens
        )
        if request.echo:
            prompts = [self._with_text(prompt) for prompt in prompts]
        return Generation(
            self.service.host,
            self.service.metrics,
            self.id,
            prompts,
            self.params,
            request.priority,
            request.cache_salt,
            form_field=self.form_field,
        )

    def _with_text(self, prompt: Prompt) -> Prompt:
        """A prompt of token ids with its text, which an echo shows."""
        if prompt.text is not None:
            return prompt
        if self.llm.tokenizer is None:
            raise invalid("echo shows text, and this server has no tokenizer", "echo")
        text = decode(
            self.llm.tokenizer,
            prompt.token_ids,
            skip_special_tokens=self.params.skip_special_tokens,
        )
        return Prompt(text, prompt.token_ids)


class _Writer:
    """Turns the outputs of one sequence, whole or piece by piece, into choices."""

    def __init__(self, call: _Call, prompt_token_ids: list[int]) -> None:
        self._call = call
        self._prompt_token_ids = prompt_token_ids
        self._is_first = True
        self._offset = 0
        request = call.request
        self._plain = not (
            request.logprobs is not None or request.return_token_ids
            or request.tells_usage_always or call.llm.tokenizer is None
        )  # fmt: skip
        self._text_events: TextEvents | None = None

    def says_text_only(self, part: CompletionOutput) -> bool:
        """Whether all there is to tell of a part is its text."""
        return self._plain and not self._is_first and part.finish_reason is None

    def text_event(self, number: int, text: str, count: UsageCount) -> bytes:
        """The event of a part of choice `number` that says text only."""
        if self._text_events is None:
            choice = CompletionChoice(
                index=number, text=TextEvents.TEXT, logprobs=None, finish_reason=None,
                stop_reason=None,
            )  # fmt: skip
            self._text_events = TextEvents(self._call.chunk([choice], count))
        return self._text_events.event(text)

    def has_news(self, part: CompletionOutput) -> bool:
        """Whether there is anything to tell: text may be held back until a stop is ruled out."""
        request = self._call.request
        return bool(
            part.text or part.finished or self._is_first
            or request.logprobs is not None or request.return_token_ids
            # Without a tokenizer nothing else says that there is a token.
            or self._call.llm.tokenizer is None
        )  # fmt: skip

    def choice(
        self, number: int, output: RequestOutput, part: CompletionOutput
    ) -> CompletionChoice:
        """What `part` adds to choice `number`."""
        request = self._call.request
        choice = CompletionChoice(
            index=number,
            text=self._text(output, part),
            logprobs=None,
            finish_reason="length" if self._drops(part) else part.finish_reason,
            stop_reason=part.stop_reason,
        )
        if request.logprobs is not None:
            ids, entries = self._logprobs(output, part)
            choice.logprobs, self._offset = completion_logprobs(
                ids, entries, self._offset, self._call.llm.tokenizer, self._call.silent
            )
        if request.return_token_ids:
            choice.token_ids = [] if self._call.drops_output else part.token_ids
            if self._is_first:
                choice.prompt_token_ids = self._prompt_token_ids
        if self._is_first and request.prompt_logprobs is not None and output.prompt_logprobs:
            choice.prompt_logprobs = prompt_logprobs(output.prompt_logprobs)
        self._is_first = False
        return choice

    def _drops(self, part: CompletionOutput) -> bool:
        return self._call.drops_output and part.finished

    def _text(self, output: RequestOutput, part: CompletionOutput) -> str:
        text = "" if self._call.drops_output else part.text
        return (output.prompt or "") + text if self._echoes else text

    @property
    def _echoes(self) -> bool:
        return self._is_first and bool(self._call.request.echo)

    def _logprobs(
        self, output: RequestOutput, part: CompletionOutput
    ) -> tuple[list[int], list[dict[int, Logprob] | None]]:
        """Token ids and their entries: of the prompt, if it is echoed, then of the output."""
        ids: list[int] = []
        entries: list[dict[int, Logprob] | None] = []
        if self._echoes:
            ids += output.prompt_token_ids
            entries += output.prompt_logprobs or []
        if not self._call.drops_output:
            ids += part.token_ids
            entries += part.logprobs or []
        return ids, entries
