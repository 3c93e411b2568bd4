"""GET /v1/models."""

from __future__ import annotations

from typing import Literal

from .base import Answer


class ModelCard(Answer):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "autodeploy"
    root: str
    """What was deployed, whatever name it is served under."""
    max_model_len: int


class ModelList(Answer):
    object: Literal["list"] = "list"
    data: list[ModelCard]
