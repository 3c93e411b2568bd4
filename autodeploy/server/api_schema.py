"""The OpenAPI schema that /openapi.json shows: FastAPI's, with what the gates and errors add.

FastAPI knows the routes. That requests pass keys and a size limit first, that wrong ones are
answered 400 and not 422, and that answers may be streams, it cannot know.
"""

from __future__ import annotations

import math
from typing import Any

from fastapi import FastAPI

from ..runtime.sampling_params import FLOAT_RANGES, INT_RANGES
from .config import ServerConfig
from .gates import OPEN_PATHS
from .responses import PATH as RESPONSES

Schema = dict[str, Any]
_ERROR: Schema = {
    "title": "Error",
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "the field to blame"},
                "code": {"type": ["string", "null"], "description": "what a program looks at"},
            },
        }
    },
}
_EVENTS = "with stream=true: a piece or an error each, and [DONE]"
_TYPED_EVENTS = "with stream=true: named by their types, the last one with the whole response"
REFUSALS = {
    "400": "The request is wrong.",
    "401": "No API key, or a wrong one.",
    "404": "Another model is asked for.",
    "413": "The body is larger than the server takes.",
    "429": "As many sequences are open as the server holds; Retry-After says when to come back.",
    "500": "This request failed, others have not.",
    "503": "The server is stopping, or its engine is gone.",
    "504": "It took longer than the server gives a request.",
}
"""What an operation may be refused with, by status."""
_TEXT = {"type": "string"}
_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"enum": ["text", "input_text", "output_text"]}, "text": _TEXT},
}
_PARTS = {"type": "array", "items": {"anyOf": [_TEXT, _PART]}}
_ROLE = {
    "type": "string",
    "minLength": 1,
    "description": "system, developer, user, tool, or another that the chat template knows",
}
_MESSAGES: Schema = {
    "minItems": 1,
    "items": {
        "anyOf": [
            {
                "type": "object",
                "required": ["role", "content"],
                "properties": {"role": _ROLE, "content": {"anyOf": [_TEXT, _PARTS]}},
            },
            {
                "type": "object",
                "required": ["role"],
                "properties": {
                    "role": {"const": "assistant"},
                    "content": {"anyOf": [_TEXT, _PARTS, {"type": "null"}]},
                },
            },
        ]
    },
}


def show_schema(app: FastAPI, config: ServerConfig) -> None:
    """Makes `app` show its whole schema, with the limits of this server."""
    made = app.openapi

    def openapi() -> Schema:
        if app.openapi_schema is None:
            app.openapi_schema = _completed(made(), config)
        return app.openapi_schema

    # FastAPI's documented way to change the schema.
    app.openapi = openapi  # type: ignore[method-assign]


def _completed(schema: Schema, config: ServerConfig) -> Schema:
    components = schema["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    components["schemas"]["Error"] = _ERROR
    if config.api_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            if config.api_key and path not in OPEN_PATHS:
                operation["security"] = [{"key": []}]
            _add_refusals(operation, _refusals(path, method, operation))
            body = _body(operation, components["schemas"])
            _add_limits(body, config)
            if "stream" in body:
                told = _TYPED_EVENTS if path == RESPONSES else _EVENTS
                operation["responses"]["200"]["content"]["text/event-stream"] = _stream_of(told)
    return schema


def _refusals(path: str, method: str, operation: Schema) -> list[str]:
    """Statuses that an operation may be refused with."""
    found = ["401"] if "security" in operation else []
    places = {parameter["in"] for parameter in operation.get("parameters", ())}
    if "path" in places:
        found += ["404"]
    if "query" in places:
        found += ["400"]
    if "requestBody" in operation:
        found += ["400", "404", "413", "500", "503"]
    if method == "post" and path.startswith("/v1/"):  # these make the engine work
        found += ["429", "504"]
    return sorted(found)


def _add_refusals(operation: Schema, statuses: list[str]) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    for status in statuses:
        answer: Schema = {
            "description": REFUSALS[status],
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        if status == "429":
            answer["headers"] = {"Retry-After": {"schema": {"type": "string"}}}
        responses.setdefault(status, answer)


def _stream_of(told: str) -> Schema:
    """Server-sent events, of which each is of `itemSchema` (OpenAPI 3.2, and FastAPI's own)."""
    return {
        "itemSchema": {
            "type": "object",
            "description": told,
            "required": ["data"],
            "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
        }
    }


def _body(operation: Schema, schemas: Schema) -> Schema:
    """The fields of an operation's requests; none of one without a body."""
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    name = body.get("schema", {}).get("$ref", "").rpartition("/")[2]
    found: Schema = schemas.get(name, {}).get("properties", {})
    return found


def _add_limits(properties: Schema, config: ServerConfig) -> None:
    """Says of a request's fields how large they may be."""
    if "messages" in properties:
        _of_type(properties["messages"], "array").update(_MESSAGES)
    limits = {name: (low, high) for name, (low, high, _) in (INT_RANGES | FLOAT_RANGES).items()}
    limits["n"] = (1, config.max_n)
    limits["max_output_tokens"] = limits["max_tokens"]
    limits["max_tokens"] = (0, limits["max_tokens"][1])  # 0 with echo
    limits["dimensions"] = (1, math.inf)
    for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
        limits[name] = (0, config.max_logprobs)
    for name, (low, high) in limits.items():
        for kind in ("integer", "number"):
            shown = _of_type(properties.get(name, {}), kind)
            if shown:
                shown["minimum"] = low
                if math.isfinite(high):
                    shown["maximum"] = high


def _of_type(field: Schema, kind: str) -> Schema:
    """The part of a field's schema that is of a type; an empty one if there is none."""
    found: list[Schema] = [each for each in field.get("anyOf", [field]) if each.get("type") == kind]
    return found[0] if found else {}
