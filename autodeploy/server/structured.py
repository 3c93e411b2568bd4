"""response_format: what form an output must have, as a change of SamplingParams."""

from __future__ import annotations

from typing import Any

from ..errors import SamplingParamsError
from ..runtime.sampling_params import SamplingParams
from ..runtime.structured_params import StructuredOutputsParams
from .errors import invalid
from .parsing import ToolOptions, required_output


def constrained(params: SamplingParams, response_format: dict[str, Any] | None) -> SamplingParams:
    """`params` under which only outputs of the asked form can be made.

    A schema that cannot be compiled is refused later, when the request is read by the engine.

    Raises:
        ApiError: the form is unknown, or contradicts another field.
    """
    kind = "text" if response_format is None else response_format.get("type")
    if response_format is None or kind == "text":
        return params
    try:
        if kind == "json_object":
            wanted = StructuredOutputsParams(json_object=True)
        elif kind == "json_schema":
            wanted = StructuredOutputsParams(json=_schema(response_format.get("json_schema")))
        else:
            raise invalid(
                f"response_format of type {str(kind)!r:.60} is not known here; use 'text', "
                "'json_object' or 'json_schema'",
                "response_format.type",
            )
        return params.clone(structured_outputs=wanted)
    except SamplingParamsError as error:
        raise invalid(f"response_format: {error}", "response_format") from error


def demanding_a_call(
    params: SamplingParams, options: ToolOptions, response_format: dict[str, Any] | None
) -> SamplingParams:
    """`params` under which a call is made, if the request demands one.

    Raises:
        ApiError: the request demands another form as well.
    """
    schema = required_output(options)
    if schema is None:
        return params
    if response_format is not None and response_format.get("type") != "text":
        raise invalid(
            "tool_choice demands a call, and response_format another output; leave one out",
            "response_format",
        )
    # Nobody reads a call's spaces, and small models make them without end.
    wanted = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
    return params.clone(structured_outputs=wanted)


def _schema(given: Any) -> dict[str, Any]:
    """The schema of {name, schema, strict}; without one any value is right."""
    if not isinstance(given, dict):
        raise invalid(
            "response_format of type 'json_schema' needs json_schema={'name': ..., 'schema': ...}",
            "response_format.json_schema",
        )
    schema = given.get("schema", {})
    if not isinstance(schema, dict):
        raise invalid(
            "response_format.json_schema.schema must be an object", "response_format.json_schema"
        )
    return schema
