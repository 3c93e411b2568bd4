"""Traces: one OpenTelemetry span per request that generates, sent by OTLP over HTTP.

Only if somebody asks: opentelemetry is imported when `Traces` is made, and comes with the extra
`otel`. A span is made when its request has ended, from its record, so that nothing is paid while
tokens stream; a batching thread sends it. The caller's `traceparent` header makes it part of the
caller's trace. Names: OpenTelemetry's semantic conventions for generative AI; those of latencies
are vLLM's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .record import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_OPERATIONS = {"/chat/completions": "chat", "/responses": "chat", "/embeddings": "embeddings"}


class Traces:
    """Sends spans to `endpoint`, such as http://localhost:4318/v1/traces.

    exporter: what takes the spans instead.

    Raises:
        ConfigError: opentelemetry is not installed, or the endpoint is no http URL.
    """

    def __init__(
        self, endpoint: str, service: str = "autodeploy", exporter: SpanExporter | None = None
    ) -> None:
        if not endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"the endpoint for traces must be an http URL, not '{endpoint}'; for a collector "
                "on this machine use http://localhost:4318/v1/traces"
            )
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                f"traces need opentelemetry ({error}): pip install 'autodeploy-llm[otel]'"
            ) from error
        # Its own provider, not the process's: a server does not decide what its host traces.
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
        exporter = exporter or OTLPSpanExporter(endpoint=endpoint)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("autodeploy")

    def report(self, record: RequestRecord, headers: Mapping[str, bytes]) -> None:
        """Makes the span of a request that has ended. headers: its own, names in lower case."""
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {
            name: headers[name].decode("latin-1")
            for name in ("traceparent", "tracestate")
            if name in headers
        }
        known = (name for end, name in _OPERATIONS.items() if record.path.endswith(end))
        operation = next(known, "text_completion")
        span = self._tracer.start_span(
            f"{operation} {record.model}",
            context=TraceContextTextMapPropagator().extract(carrier),
            kind=SpanKind.SERVER,
            attributes=span_attributes(record, operation),
            start_time=_nanoseconds(record.started),
        )
        if record.error is not None:
            span.set_status(Status(StatusCode.ERROR, record.error))
        span.end(_nanoseconds(record.started + record.seconds))

    def shutdown(self) -> None:
        """Sends what is left; blocks until it is sent or given up."""
        self._provider.shutdown()


def span_attributes(record: RequestRecord, operation: str) -> dict[str, Any]:
    """Attributes of a request's span; those whose value is not known are left out."""
    attributes = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "autodeploy",
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.request.max_tokens": record.max_tokens,
        "gen_ai.request.temperature": record.temperature,
        "gen_ai.request.top_p": record.top_p,
        "gen_ai.request.choice.count": record.sequences,
        "gen_ai.response.finish_reasons": list(record.finish_reasons),
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "gen_ai.usage.output_tokens": record.output_tokens,
        "gen_ai.request.id": record.request_id,
        "gen_ai.latency.time_in_queue": record.queue_seconds,
        "gen_ai.latency.time_to_first_token": record.first_token_seconds,
        "gen_ai.latency.e2e": record.seconds,
        "http.request.method": record.method,
        "http.response.status_code": record.status,
        "url.path": record.path,
        "error.type": record.error,
    }
    return {name: value for name, value in attributes.items() if value is not None}


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
