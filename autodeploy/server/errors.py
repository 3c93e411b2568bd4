"""Errors as clients of OpenAI's API know them: one object, one status, one table.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from .. import errors
from ..runtime.sampling_params import SamplingParams

RETRY_SECONDS = "1"
"""When a client that was sent away for the moment should come back."""


class ApiError(Exception):
    """A request is answered with an error.

    param: the field of the request that is to blame. code: what a program would look at.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # A message may quote the request, which may hold half of a surrogate pair.
        super().__init__(message.encode(errors="backslashreplace").decode())
        self.status = status
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.param = param and param.encode(errors="backslashreplace").decode()
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error object of the answer."""
        return {
            "error": {
                "message": str(self), "type": self.kind, "param": self.param, "code": self.code,
            }
        }  # fmt: skip

    def encoded(self) -> bytes:
        """The error object as JSON."""
        return msgspec.json.encode(self.body())


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The answer to a request that cannot be served as written: 400."""
    return ApiError(400, message, param=param, code=code)


@dataclass(frozen=True)
class Answer:
    """Status and code that a class of errors is answered with."""

    status: int
    code: str | None = None
    hides_message: bool = False
    """Whether the message is for our log and not for the client."""


ANSWERS: dict[type[errors.AutodeployError], Answer] = {
    errors.InvalidRequestError: Answer(400),
    errors.EmptyPromptError: Answer(400),
    errors.PromptTooLongError: Answer(400, "context_length_exceeded"),
    errors.UnknownTokenError: Answer(400),
    errors.SamplingParamsError: Answer(400),
    errors.ConfigError: Answer(500, hides_message=True),
    errors.RecipeError: Answer(500, hides_message=True),
    errors.ModelError: Answer(500, hides_message=True),
    errors.CheckpointError: Answer(500, hides_message=True),
    errors.UnsupportedModelError: Answer(500, hides_message=True),
    errors.NotCausalError: Answer(500, hides_message=True),
    errors.CaptureError: Answer(500, hides_message=True),
    errors.TransformError: Answer(500, hides_message=True),
    errors.VerificationError: Answer(500, hides_message=True),
    errors.AutodeployError: Answer(500),
    errors.EngineError: Answer(500, "engine_error"),
    errors.EngineDeadError: Answer(503, "engine_dead"),
    errors.OutOfMemoryError: Answer(503, "out_of_memory"),
}
"""Every class of the tree; a test holds that none is missing."""

_INTERNAL = "the server failed to serve this request; its log says why, under the request's id"


def as_api_error(error: BaseException) -> ApiError:
    """What any exception is answered with; one that nobody foresaw is a 500 without details."""
    if isinstance(error, ApiError):
        return error
    if not isinstance(error, errors.AutodeployError):
        return ApiError(500, _INTERNAL)
    answer = next(ANSWERS[kind] for kind in type(error).__mro__ if kind in ANSWERS)
    if answer.hides_message:
        return ApiError(500, _INTERNAL)
    # An engine that died is started again, here or by whoever restarts the server.
    headers = {"Retry-After": RETRY_SECONDS} if answer.status == 503 else None
    return ApiError(
        answer.status, str(error), param=_param(error), code=answer.code, headers=headers
    )


def _param(error: errors.AutodeployError) -> str | None:
    """The sampling field that a message opens with."""
    if not isinstance(error, errors.SamplingParamsError):
        return None
    first = re.match(r"\w+", str(error))
    return first[0] if first and first[0] in SamplingParams.__struct_fields__ else None
