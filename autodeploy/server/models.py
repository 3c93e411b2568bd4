"""GET /v1/models: what this server serves."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from .protocol.models import ModelCard, ModelList
from .service import Service, service_of

router = APIRouter()


@router.get("/v1/models")
async def models(service: Annotated[Service, Depends(service_of)]) -> ModelList:
    """Every name of the model."""
    cards = [_card(service, name) for name in service.model_names]
    return ModelList(object="list", data=cards)


@router.get("/v1/models/{name:path}")
async def model(name: str, service: Annotated[Service, Depends(service_of)]) -> ModelCard:
    """The model, under one of its names."""
    return _card(service, service.model_name(name))


def _card(service: Service, name: str) -> ModelCard:
    return ModelCard(
        id=name, created=service.created, root=service.model,
        max_model_len=service.host.llm.max_model_len,
    )  # fmt: skip
