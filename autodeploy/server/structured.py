"""What form an output must have: response_format and vLLM's fields, as SamplingParams."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from ..errors import SamplingParamsError
from ..runtime.sampling_params import SamplingParams
from ..runtime.structured_params import StructuredOutputsParams
from ..transforms.recipe import suggest
from .errors import ApiError, invalid
from .parsing import ToolOptions, required_output
from .protocol.sampling import TokenFields

_OURS = "structured_outputs"
_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}


@dataclass(frozen=True)
class Form:
    """A form that a request asks for. field: where it does so."""

    field: str
    params: StructuredOutputsParams


def asked_form(
    request: TokenFields, response_format: dict[str, Any] | None, field: str = "response_format"
) -> Form | None:
    """The form that the fields of a request ask for; None for any text.

    A schema that cannot be compiled is refused later, when the request is read by the engine.
    field: the name of `response_format` on this endpoint.

    Raises:
        ApiError: the form is unknown, or several are asked for.
    """
    wanted = {field: _of_format(response_format, field)}
    if request.structured_outputs is not None:
        wanted[_OURS] = _checked(request.structured_outputs)
    for name, kind in _GUIDED.items():
        if getattr(request, name) is not None:
            wanted[name] = {kind: getattr(request, name)}
    given = {name: fields for name, fields in wanted.items() if fields is not None}
    if len(given) > 1:
        raise invalid(
            f"{' and '.join(given)} each ask for a form of the output; give one of them",
            list(given)[-1],
        )
    for name, fields in given.items():
        try:
            return Form(name, StructuredOutputsParams(**fields))
        except SamplingParamsError as error:
            raise _blamed(error, name) from error
    return None


def constrained(params: SamplingParams, form: Form | None) -> SamplingParams:
    """`params` under which only outputs of the form can be made.

    Raises:
        ApiError: it contradicts another field.
    """
    if form is None:
        return params
    try:
        return params.clone(structured_outputs=form.params)
    except SamplingParamsError as error:
        raise _blamed(error, form.field) from error


def field_of(form: Form | None) -> str:
    """The field of a request that says what its structured outputs must be."""
    # A form that no field asks for is that of a call.
    return "tools" if form is None else form.field


@contextmanager
def blaming(field: str) -> Iterator[None]:
    """What the engine says of structured outputs is said of the field that the client sent.

    Raises:
        ApiError: for a SamplingParamsError about them.
    """
    try:
        yield
    except SamplingParamsError as error:
        if not str(error).startswith(_OURS):
            raise
        raise _blamed(error, field) from error


def demanding_a_call(
    params: SamplingParams, options: ToolOptions, form: Form | None
) -> SamplingParams:
    """`params` under which a call is made, if the request demands one.

    Raises:
        ApiError: the request demands another form as well.
    """
    schema = required_output(options)
    if schema is None:
        return params
    if form is not None:
        raise invalid(
            f"tool_choice demands a call, and {form.field} another output; leave one out",
            form.field,
        )
    # Nobody reads a call's spaces, and small models make them without end.
    wanted = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
    return params.clone(structured_outputs=wanted)


def _of_format(response_format: dict[str, Any] | None, field: str) -> dict[str, Any] | None:
    """Fields of StructuredOutputsParams for {type, ...}; None: any text."""
    kind = "text" if response_format is None else response_format.get("type")
    if response_format is None or kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        return {"json": _schema(response_format, field)}
    raise invalid(
        f"{field} of type {str(kind)!r:.60} is not known here; use 'text', 'json_object' or "
        "'json_schema'",
        f"{field}.type",
    )


def _schema(response_format: dict[str, Any], field: str) -> dict[str, Any]:
    """The schema of {name, schema, strict}; without one any value is right.

    Chat completions have it below `json_schema`, responses beside the type.
    """
    place = f"{field}.json_schema" if field == "response_format" else field
    given = response_format.get("json_schema") if place != field else response_format
    if not isinstance(given, dict):
        raise invalid(
            f"{field} of type 'json_schema' needs json_schema={{'name': ..., 'schema': ...}}", place
        )
    schema = given.get("schema", {})
    if not isinstance(schema, dict):
        raise invalid(f"{place}.schema must be an object", place)
    return schema


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """`structured_outputs` with names that are known.

    Raises:
        ApiError: one is not.
    """
    known = [field.name for field in msgspec.structs.fields(StructuredOutputsParams)]
    for name in given:
        if name not in known:
            raise _unknown(f"structured_outputs.{name}", suggest(name, known))
    return given


def _blamed(error: SamplingParamsError, field: str) -> ApiError:
    """The answer to a form that cannot be had: 400, in terms of the field that asked for it."""
    message = str(error)
    if field != _OURS:
        message = re.sub(rf"^{_OURS}(\.\w+)?", field, message)
    return invalid(message, field)


def _unknown(param: str, hint: str) -> ApiError:
    return invalid(
        f"Unrecognized request argument supplied: {param}{hint}", param, "unknown_parameter"
    )
