"""The application: endpoints, one file each, behind the gates every request passes."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from .. import __version__
from ..errors import AutodeployError
from . import chat, completions, embeddings, health, models, responses, tokens
from .admission import Admission
from .api_schema import show_schema
from .chat_message import formats_of
from .config import ServerConfig
from .engine_host import EngineHost
from .errors import ApiError, as_api_error, invalid
from .gates import ApiKeys, BodyLimit, RootPath, error_response
from .metrics import ServerMetrics
from .observation import Observation
from .page import page_router
from .response_store import ResponseStore
from .service import Service
from .status import status_router

_log = logging.getLogger("autodeploy")
_NEW_OBJECTS = 50_000
ENDPOINTS = (completions, chat, responses, embeddings, models, tokens, health)


def build_app(config: ServerConfig, host: EngineHost, model: str) -> FastAPI:
    """An ASGI application over engines that run; its end is their end.

    model: what was deployed; its name, unless the config has others.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with _spared_garbage_collection():
            host.start()
            yield
            await host.stop()

    # No pages of documentation: they would load scripts from elsewhere.
    app = FastAPI(
        title="autodeploy", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    name = (config.served_model_name or [model])[0]
    metrics = ServerMetrics(lambda: host.llms, name)
    formats = formats_of(config, getattr(host.llm.tokenizer, "chat_template", None))
    app.state.service = Service(
        config, host, Admission(config.max_open_sequences), metrics, formats, model,
        int(time.time()), ResponseStore(config.response_store),
    )  # fmt: skip
    for endpoint in ENDPOINTS:
        app.include_router(endpoint.router)
    app.include_router(metrics.router())
    app.include_router(status_router(host, name, bool(config.api_key)))
    app.include_router(page_router())
    show_schema(app, config)
    _add_error_handlers(app)
    _add_gates(app, config, metrics)
    return app


@contextmanager
def _spared_garbage_collection() -> Iterator[None]:
    """Looks for cycles seldom, and not among what stays: it was a quarter of the server's time.

    What is there by now, torch and the tokenizer, is not looked at again. A request makes some
    hundred objects that live as long as it does, so with hundreds of them open a look after every
    700 new ones, Python's default, goes through all of them for nothing.
    """
    usual = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS, 10, 10)
    try:
        yield
    finally:
        # A process that goes on, as one that tests, gets its engines' memory back.
        gc.set_threshold(*usual)
        gc.unfreeze()


def _add_gates(app: FastAPI, config: ServerConfig, metrics: ServerMetrics) -> None:
    """The last one added is the first one passed."""
    app.add_middleware(BodyLimit, limit=config.max_request_bytes)
    if config.api_key:
        app.add_middleware(ApiKeys, keys=config.api_key, root_path=config.root_path)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=config.allowed_origins, allow_methods=["*"],
            allow_headers=["*"], expose_headers=["X-Request-Id", "Retry-After"],
        )  # fmt: skip
    if config.root_path:
        app.add_middleware(RootPath, root_path=config.root_path)
    traces = None
    if config.otlp_traces_endpoint is not None:
        from .traces import Traces

        traces = Traces(config.otlp_traces_endpoint)
    app.add_middleware(Observation, metrics=metrics, traces=traces)


def _add_error_handlers(app: FastAPI) -> None:
    async def on_error(request: Request, error: Exception) -> Response:
        problem = as_api_error(error)
        if problem.status == 500:
            name = request.scope.get("state", {}).get("request_id")
            known = isinstance(error, (ApiError, AutodeployError))
            _log.error("request %s failed: %s", name, error, exc_info=None if known else error)
        return error_response(problem)

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(_of_validation(error.errors()))

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = _methods_of(request) or headers.get("Allow", "")
        return error_response(
            ApiError(error.status_code, _sentence(request, error), headers=headers)
        )

    app.add_exception_handler(ApiError, on_error)
    app.add_exception_handler(AutodeployError, on_error)
    app.add_exception_handler(Exception, on_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http_error)


def _methods_of(request: Request) -> str:
    """What the path takes. Starlette tells the first route's methods only."""
    path = getattr(request.scope.get("route"), "path", None)
    routes = [route for endpoint in ENDPOINTS for route in endpoint.router.routes]
    same = [route for route in routes if getattr(route, "path", None) == path]
    return ", ".join(sorted({method for route in same for method in getattr(route, "methods", ())}))


def _sentence(request: Request, error: HTTPException) -> str:
    if error.status_code == 404:
        return f"there is no {request.method} {request.url.path} here"
    if error.status_code == 405:
        return f"{request.url.path} does not take {request.method}"
    return str(error.detail)


def _of_validation(problems: Sequence[Any]) -> ApiError:
    """One error for what pydantic found, as OpenAI words it: the first unknown field, or field."""
    unknown = [p for p in problems if p["type"] == "extra_forbidden"]
    first = (unknown or problems)[0]
    # The first step is where the fields are: in the body, the query or the path.
    place = [str(step) for step in first["loc"][1:]]
    param = ".".join(place) or None
    if first["type"] == "extra_forbidden":
        return invalid(
            f"Unrecognized request argument supplied: {param}", param, "unknown_parameter"
        )
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return invalid(f"the body of the request is not JSON: {reason}")
    # Of a union each alternative complains, under a name of its own; the field is what matters.
    field = place[0] if place else None
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_type"
    return invalid(f"{param or 'the body'}: {first['msg']}", field, code)
