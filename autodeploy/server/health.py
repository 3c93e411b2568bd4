"""GET /health, /ready and /version: what probes and load balancers ask, without a key.

/health: whether an engine lives; restart what says no. /ready: whether requests should come here.
With several replicas one that lives is enough for both: those that died come back by themselves, or
the server goes (`on_engine_death`), and restarting it from outside would end the others' requests.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import JSONResponse

from .. import __version__
from .protocol.base import Answer
from .service import Service, service_of
from .status import state

router = APIRouter()


class Status(Answer):
    """What a probe may show; what counts is the HTTP status."""

    status: str
    reason: str | None = None


_STATUS: dict[int | str, dict[str, Any]] = {
    200: {"model": Status},
    503: {"model": Status, "description": "No, for the reason given."},
}


@router.get("/health", response_model=None, responses=_STATUS)
async def health(service: Annotated[Service, Depends(service_of)]) -> JSONResponse:
    """200 while an engine lives, else 503."""
    death = service.host.death
    if death is not None:
        return JSONResponse({"status": "dead", "reason": str(death)}, 503)
    return JSONResponse({"status": state(service.host)})


@router.get("/ready", response_model=None, responses=_STATUS)
async def ready(service: Annotated[Service, Depends(service_of)]) -> JSONResponse:
    """200 while new requests are taken, else 503."""
    if service.admission.draining:
        return JSONResponse({"status": "shutting down"}, 503)
    if service.host.death is not None:
        return JSONResponse({"status": "no engine"}, 503)
    return JSONResponse({"status": "ready"})


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of autodeploy."""
    return {"version": __version__}
