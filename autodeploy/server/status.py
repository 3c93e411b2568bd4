"""GET /api/status: what is deployed and how it does, as one JSON object, for the page at `/`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
from fastapi import APIRouter

from .. import __version__
from ..match_counts import read_match_counts
from .metrics import Served


class Deployed(Served, Protocol):
    """What is served, and what can be said of it; `AsyncLLM` is one."""

    tokenizer: Any

    @property
    def vocab_size(self) -> int: ...
    @property
    def summary(self) -> dict[str, str]: ...


def status(llm: Deployed, model_name: str, needs_api_key: bool) -> dict[str, Any]:
    """The object: facts of the deployment, and the engine's last report.

    time: seconds since the epoch, so that a reader can make rates of two reports' counters.
    """
    facts = llm.summary
    return {
        "model": model_name,
        "version": __version__,
        "needs_api_key": needs_api_key,
        "has_tokenizer": llm.tokenizer is not None,
        "has_chat_template": bool(getattr(llm.tokenizer, "chat_template", None)),
        "max_model_len": llm.max_model_len,
        "vocab_size": llm.vocab_size,
        "device": facts.get("device", "unknown"),
        "dtype": facts.get("dtype", "unknown"),
        "rung": facts.get("rung", "unknown"),
        "recipe": facts.get("recipe", "none"),
        "transforms": [
            {"step": step, "matches": matches} for step, matches in read_match_counts(facts).items()
        ],
        "time": time.time(),
        "open_requests": llm.open_requests,
        "stats": msgspec.to_builtins(llm.stats),
    }


def status_router(
    llm: Callable[[], Deployed], model_name: str, needs_api_key: bool = False
) -> APIRouter:
    """GET /api/status. llm: gives what is served now, which a restart may change."""
    router = APIRouter()

    @router.get("/api/status", include_in_schema=False)
    async def read_status() -> dict[str, Any]:
        return status(llm(), model_name, needs_api_key)

    return router
