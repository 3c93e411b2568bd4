"""POST /v1/responses: items in, items out; the response can be asked for and gone on from."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from ..outputs import CompletionOutput, RequestOutput
from .answers import Closing
from .chat_message import options_of, parser_of
from .errors import ApiError, invalid
from .generation import Generation, UsageCount
from .logprobs import chat_logprobs
from .protocol.responses import (
    DeletedResponse,
    InputTokensDetails,
    OutputTokensDetails,
    ResponseObject,
    ResponseRequest,
    ResponseUsage,
)
from .protocol.sampling import check_logprobs
from .response_items import input_items
from .response_object import opening_object
from .response_output import OutputWriter
from .response_prompt import response_prompt
from .response_store import Kept, owner_of
from .service import Service, service_of
from .structured import asked_form, constrained, demanding_a_call, field_of

router = APIRouter()
PATH = "/v1/responses"


@router.post(PATH, responses={200: {"model": ResponseObject}}, response_model=None)
async def create_response(
    request: ResponseRequest, raw: Request, service: Annotated[Service, Depends(service_of)]
) -> Response:
    """Answers an input."""
    call = _Call(request, service, owner_of(raw.headers.get("authorization")))
    if not request.stream:
        return service.whole(call.answer())
    return service.stream(call.events(), Closing(b"", call.failure))


@router.get(PATH + "/{name}", responses={200: {"model": ResponseObject}}, response_model=None)
async def get_response(
    name: str,
    raw: Request,
    service: Annotated[Service, Depends(service_of)],
    stream: bool = False,
) -> Response:
    """A response that is kept; as a whole only."""
    if stream:
        raise invalid("a response that is kept is not streamed again; leave out stream", "stream")
    kept = service.responses.get(name, owner_of(raw.headers.get("authorization")))
    if kept is None:
        raise _not_here(name)
    return Response(kept.response, media_type="application/json")


@router.delete(PATH + "/{name}")
async def delete_response(
    name: str, raw: Request, service: Annotated[Service, Depends(service_of)]
) -> DeletedResponse:
    """Forgets a response."""
    if not service.responses.drop(name, owner_of(raw.headers.get("authorization"))):
        raise _not_here(name)
    return DeletedResponse(id=name, object="response", deleted=True)


def _not_here(name: str) -> ApiError:
    return ApiError(404, f"Response with id '{name:.80}' not found.", code="response_not_found")


class _Call:
    """One request to the endpoint."""

    def __init__(self, request: ResponseRequest, service: Service, owner: bytes) -> None:
        self.request = request
        self.service = service
        self.owner = owner
        self.llm = service.host.living()
        self.id = f"resp_{uuid.uuid4().hex}"
        request.check_limits(service.config)
        check_logprobs("top_logprobs", request.top_logprobs, service.config)
        _refuse_unserved(request)
        self.tools = options_of(request, service.formats)
        self.parser = parser_of(self.tools, service.formats)
        self.params = self._params()
        self.items = self._known_items() + input_items(request.input)
        self.spelled = _as_json(self.items, "input")
        self.object = opening_object(
            request, self.id, service.model_name(request.model), self.params, self.stores
        )
        _as_json(self.object.model_dump(), None)
        self.writer = OutputWriter()
        self._number = 0

    @property
    def stores(self) -> bool:
        """Whether the response will be kept."""
        return self.service.responses.limit > 0 and self.request.store is not False

    async def answer(self) -> ResponseObject:
        with self.service.admission.sequences(1):
            generation = await self._generation()
            count = UsageCount(generation.prompts)
            async with aclosing(self._outputs(generation)) as outputs:
                async for output, fields in outputs:
                    count.add(0, output)
                    for _ in fields:
                        pass  # only a stream tells of them
        return self._finish(output.outputs[0], count)

    async def events(self) -> AsyncGenerator[bytes, None]:
        with self.service.admission.sequences(1):
            generation = await self._generation()
            count = UsageCount(generation.prompts)
            async with aclosing(self._outputs(generation)) as outputs:
                async for output, fields in outputs:
                    if not self._number:
                        # Not before: what the engine refuses has a status of its own.
                        yield self._about("response.created")
                        yield self._about("response.in_progress")
                    count.add(0, output)
                    for each in fields:
                        yield self._event(each)
            self._finish(output.outputs[0], count)
            yield self._about(f"response.{self.object.status}")

    def failure(self, problem: ApiError) -> bytes:
        """The last event of a stream that cannot go on."""
        self.object.status = "failed"
        self.object.error = {"code": "server_error", "message": str(problem)}
        self.object.output = self.writer.items
        return self._about("response.failed")

    async def _outputs(
        self, generation: Generation
    ) -> AsyncGenerator[tuple[RequestOutput, Iterator[dict[str, Any]]], None]:
        """Each output with the events it makes; one output, unless there is a use for more."""
        stream = self.parser.stream(generation.prompts[0].text or "")
        if not self.request.stream and not self.request.wants_logprobs:
            (whole,) = await generation.whole()
            yield whole, self._fields(stream, whole.outputs[0])
            return
        async with aclosing(generation.deltas()) as deltas:
            async for _, delta in deltas:
                for part in delta.outputs:
                    yield delta, self._fields(stream, part)

    def _fields(self, stream: Any, part: CompletionOutput) -> Iterator[dict[str, Any]]:
        pieces = stream.push(part.text) if part.text else []
        if part.finished:
            pieces += stream.end()
        yield from self.writer.add(pieces, self._logprobs(part))
        if part.finished:
            yield from self.writer.end(part.finish_reason != "length")

    def _logprobs(self, part: CompletionOutput) -> Iterable[Any]:
        if not self.request.wants_logprobs:
            return ()
        told = chat_logprobs(part.logprobs, self.request.top_logprobs or 0)
        return [each.model_dump() for each in told.content]

    def _finish(self, last: CompletionOutput, count: UsageCount) -> ResponseObject:
        """The response, complete and kept."""
        made = self.object
        made.output = self.writer.items
        made.usage = self._usage(count)
        made.completed_at = int(time.time())
        made.status = "completed"
        if last.finish_reason == "length":
            made.status = "incomplete"
            made.incomplete_details = {"reason": "max_output_tokens"}
        if self.stores:
            encoded = made.__pydantic_serializer__.to_json(made)
            items = self.spelled[:-1] + b"," + msgspec.json.encode(made.output)[1:]
            self.service.responses.put(self.id, Kept(self.owner, encoded, items))
        return made

    def _usage(self, count: UsageCount) -> ResponseUsage:
        usage, text = count.usage(), self.writer.reasoning
        thought = (
            len(self.llm.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else 0
        )
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(
                cached_tokens=usage.prompt_tokens_details.cached_tokens
            ),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=thought),
            total_tokens=usage.total_tokens,
        )

    def _params(self) -> Any:
        request, defaults = self.request, self.llm.defaults
        changes: dict[str, Any] = {}
        if request.wants_logprobs:
            changes["logprobs"] = request.top_logprobs or 0
        if request.max_output_tokens is not None or "max_tokens" not in defaults.sampling:
            changes["max_tokens"] = request.max_output_tokens
        params = request.sampling_params(defaults.params(), **changes)
        form = asked_form(request, request.text.format if request.text else None, "text.format")
        self.form_field = field_of(form)
        params = demanding_a_call(params, self.tools, form)
        if self.parser.needs_special_tokens(getattr(self.llm.tokenizer, "all_special_tokens", ())):
            params = params.clone(skip_special_tokens=False)
        return constrained(params, form)

    def _known_items(self) -> list[dict[str, Any]]:
        """What the request goes on from."""
        name = self.request.previous_response_id
        if name is None:
            return []
        kept = self.service.responses.get(name, self.owner)
        if kept is None:
            raise invalid(
                f"Previous response with id '{name:.80}' not found: this server keeps the last "
                f"{self.service.responses.limit}, unless store=false; send the whole conversation",
                "previous_response_id",
                "previous_response_not_found",
            )
        items: list[dict[str, Any]] = msgspec.json.decode(kept.items)
        return items

    async def _generation(self) -> Generation:
        request = self.request
        prompt = await response_prompt(
            self.llm, self.items, request, self.service.config, self.tools
        )
        return Generation(
            self.service.host, self.service.metrics, self.id, [prompt], self.params,
            request.priority, request.cache_salt, form_field=self.form_field,
        )  # fmt: skip

    def _about(self, kind: str) -> bytes:
        """An event with the whole response."""
        return self._event({"type": kind, "response": self.object.model_dump()})

    def _event(self, fields: dict[str, Any]) -> bytes:
        number, self._number = self._number, self._number + 1
        body = msgspec.json.encode({**fields, "sequence_number": number})
        return b"event: " + fields["type"].encode() + b"\ndata: " + body + b"\n\n"


def _as_json(value: Any, param: str | None) -> bytes:
    """What will be told or kept, tried before any work is done for it.

    Raises:
        ApiError: a number or a text in it is none that JSON can hold.
    """
    try:
        return msgspec.json.encode(value)
    except (ValueError, OverflowError, RecursionError) as error:
        raise invalid(f"the request cannot be written as JSON again: {error}", param) from error


def _refuse_unserved(request: ResponseRequest) -> None:
    """Refuses numbers out of range, and what would need more than a model and a bounded memory."""
    for field, least in (("max_output_tokens", 1), ("top_logprobs", 0)):
        value = getattr(request, field)
        if value is not None and value < least:
            raise invalid(f"{field} must be at least {least}, not {value}", field)
    for field, instead in (
        ("background", "wait for the response, or stream it"),
        ("conversation", "use previous_response_id, or send the conversation as input"),
        ("prompt", "send instructions and input"),
        ("context_management", "use truncation='auto'"),
        ("moderation", "leave it out"),
    ):
        if getattr(request, field):
            raise invalid(f"{field} is not served here; {instead}", field)
