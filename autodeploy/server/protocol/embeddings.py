"""POST /v1/embeddings."""

from __future__ import annotations

from typing import Literal

from pydantic import SkipValidation

from .base import Answer, Request


class EmbeddingRequest(Request):
    input: str | list[str] | list[int] | list[list[int]]
    """A text, texts, token ids, or a list of token ids per prompt."""
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    """base64: of little-endian float32."""
    dimensions: int | None = None
    """Leading numbers to keep; the vector is made one of length 1 after that."""
    user: str | None = None
    """Told to nobody."""

    # vLLM's extras.
    add_special_tokens: bool | None = None
    priority: int = 0
    cache_salt: str | None = None


class Embedding(Answer):
    object: Literal["embedding"]
    index: int
    embedding: SkipValidation[list[float] | str]
    """We made it: looking at each number again would hold up every stream."""


class EmbeddingUsage(Answer):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Answer):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
