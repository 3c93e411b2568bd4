"""What the engine refuses of a request before anything is done for it."""

from __future__ import annotations

from autodeploy.errors import (
    EmptyPromptError,
    InvalidRequestError,
    PromptTooLongError,
    UnknownTokenError,
)

from .messages import EngineRequest


def check_request(
    request: EngineRequest, running: bool, task: str, vocab_size: int, max_model_len: int
) -> None:
    """Raises the specific InvalidRequestError if a request cannot be served as written.

    running: another one of its id is. task: the engine's, generate or embed.
    """
    tokens = request.prompt_token_ids
    where = f"request '{request.request_id}'"
    if running:
        raise InvalidRequestError(f"{where} is already running; give every request its own id")
    if (request.pooling is None) != (task == "generate"):
        raise InvalidRequestError(f"{where} asks for something else than to {task}")
    if not tokens:
        raise EmptyPromptError(f"{where}: the prompt has no tokens; give at least one")
    if len(tokens) >= max_model_len:
        raise PromptTooLongError(
            f"{where}: the prompt has {len(tokens)} tokens and sequences end at {max_model_len}, "
            f"prompt and output together; use at most {max_model_len - 1}"
        )
    unknown = [t for t in (min(tokens), max(tokens)) if not 0 <= t < vocab_size]
    if unknown:
        raise UnknownTokenError(
            f"{where}: token id {unknown[0]} at position {tokens.index(unknown[0])} of the prompt "
            f"is outside the vocabulary; use 0 to {vocab_size - 1}"
        )
