"""The response object before anything has come of it: what was asked, told back."""

from __future__ import annotations

import time

from ..runtime.sampling_params import SamplingParams
from .protocol.responses import ResponseObject, ResponseRequest

_TOOL = {"type": "function", "description": None, "parameters": None, "strict": None}


def opening_object(
    request: ResponseRequest, name: str, model: str, params: SamplingParams, stores: bool
) -> ResponseObject:
    """A response in progress. params: what the request has come to. stores: it will be kept."""
    reasoning, text = request.reasoning, request.text
    shown = {"format": (text and text.format) or {"type": "text"}}
    if text is not None and text.verbosity is not None:
        shown["verbosity"] = text.verbosity  # type: ignore[assignment]
    return ResponseObject(
        id=name,
        object="response",
        created_at=int(time.time()),
        completed_at=None,
        status="in_progress",
        background=False,
        error=None,
        incomplete_details=None,
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        max_tool_calls=request.max_tool_calls,
        metadata=request.metadata or {},
        model=model,
        output=[],
        parallel_tool_calls=request.parallel_tool_calls is not False,
        previous_response_id=request.previous_response_id,
        prompt_cache_key=request.prompt_cache_key,
        reasoning={"effort": reasoning and reasoning.effort, "summary": None},
        safety_identifier=request.safety_identifier,
        service_tier="default",
        store=stores,
        temperature=params.temperature,
        text=shown,
        tool_choice=request.tool_choice or "auto",
        tools=[{**_TOOL, **tool} for tool in request.tools or []],
        top_logprobs=request.top_logprobs or 0,
        top_p=params.top_p,
        truncation=request.truncation or "disabled",
        usage=None,
        user=request.user,
    )
