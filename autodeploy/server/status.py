"""GET /api/status: what is deployed and how it does, as one JSON object, for the page at `/`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import APIRouter

from .. import __version__
from ..match_counts import read_match_counts
from ..runtime.messages import EngineStats
from .engine_host import EngineHost
from .replica import Replica


def status(host: EngineHost, model_name: str, needs_api_key: bool) -> dict[str, Any]:
    """The object: facts of the deployment, and the engines' last reports, summed and one by one.

    time: seconds since the epoch, so that a reader can make rates of two reports' counters.
    """
    llm = host.llm
    facts = llm.summary
    return {
        "model": model_name,
        "version": __version__,
        "state": state(host),
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
        "open_requests": sum(one.open_requests for one in host.llms),
        "stats": msgspec.to_builtins(summed([one.stats for one in host.llms])),
        "replicas": [_replica(replica) for replica in host.replicas],
    }


def state(host: EngineHost) -> str:
    """ok: every replica serves; degraded: some do; dead: none does."""
    if len(host.serving) == len(host.replicas):
        return "ok"
    return "degraded" if host.serving else "dead"


def summed(reports: Sequence[EngineStats]) -> EngineStats:
    """Engines as one: what they count added up, and the longest step."""
    total = {name: sum(getattr(r, name) for r in reports) for name in EngineStats.__struct_fields__}
    total["step_seconds"] = max(report.step_seconds for report in reports)
    return EngineStats(**total)


def _replica(replica: Replica) -> dict[str, Any]:
    death = replica.llm.death
    return {
        "engine": replica.number,
        "state": "serving" if death is None else "starting" if replica.comes_back else "dead",
        "reason": None if death is None else str(death),
        "restarts": replica.restarts,
        "open_requests": replica.llm.open_requests,
        "open_tokens": replica.llm.open_tokens,
        "stats": msgspec.to_builtins(replica.llm.stats),
    }


def status_router(host: EngineHost, model_name: str, needs_api_key: bool = False) -> APIRouter:
    """GET /api/status."""
    router = APIRouter()

    @router.get("/api/status", include_in_schema=False)
    async def read_status() -> dict[str, Any]:
        return status(host, model_name, needs_api_key)

    return router
