"""Logs of a server: lines for people, or one JSON object a line for machines, with request ids.

What is logged of a request is its `RequestRecord`: counts, times and ids. Prompts, answers and
keys are in no record, so no format can show them.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from .record import RequestRecord, current_record

LogFormat = Literal["text", "json"]
LOG_FORMATS = ("text", "json")
ACCESS_LOGGER = "autodeploy.access"
_FIELDS = "access"
"""Attribute of a log record that holds the fields of an access line."""


def set_up_logging(log_format: LogFormat, level: int, stream: TextIO | None = None) -> None:
    """Sends the logs of this process to `stream`, standard error if None, in one format.

    uvicorn's own go the same way, if it is started with `log_config=None`; its access log, which
    shows queries, is replaced by ours.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    # The command line has given our own logger a handler for people.
    for name in ("autodeploy", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(level)
    logging.getLogger("uvicorn.access").disabled = True


def access_fields(record: RequestRecord, status: int) -> dict[str, Any]:
    """What an access line says of a request, as `extra` of a logging call."""
    fields: dict[str, Any] = {
        "method": record.method, "path": record.path, "status": status,
        "seconds": round(record.seconds, 6), "client": record.client,
    }  # fmt: skip
    if record.generates:
        fields |= {
            "model": record.model, "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens, "output_tokens": record.output_tokens,
            "finish_reasons": list(record.finish_reasons),
        }  # fmt: skip
    if record.first_token_seconds is not None:
        fields["first_token_seconds"] = round(record.first_token_seconds, 6)
    if record.error is not None:
        fields["error"] = record.error
    return {_FIELDS: fields}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (ISO 8601, UTC), level, logger, message, request_id, and the
    fields of an access line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record), "level": record.levelname, "logger": record.name,
            "message": record.getMessage(),
        }  # fmt: skip
        served = current_record()
        if served is not None:
            line["request_id"] = served.request_id
        line |= getattr(record, _FIELDS, {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """`TIME LEVEL LOGGER [REQUEST ID] MESSAGE`, an access line's fields after it as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        served = current_record()
        tag = f" [{served.request_id}]" if served is not None else ""
        line = f"{_time(record)} {record.levelname} {record.name}{tag} {record.getMessage()}"
        fields = getattr(record, _FIELDS, {})
        for name, value in fields.items():
            if name not in ("method", "path", "status"):  # the message has them
                shown = ",".join(value) if isinstance(value, list) else value
                line += f" {name}={shown}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
