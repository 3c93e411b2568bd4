"""What generating returns. Names and fields are those of vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import AutodeployError
from .runtime.messages import RequestMetrics


@dataclass(frozen=True)
class Logprob:
    """Log probability (natural) of one token under the model's own distribution."""

    logprob: float
    rank: int | None = None
    """1 is the most likely token."""
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One generated sequence of a request."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    """Sum over the output tokens; None unless logprobs were asked for."""
    logprobs: list[dict[int, Logprob]] | None = None
    """Per output token: the sampled one and the top candidates."""
    finish_reason: str | None = None
    """'stop', 'length', 'abort', 'error', or None while running."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for end of sequence and length."""

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """Everything about one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """Per prompt token; None for the first, which nothing predicts."""
    metrics: RequestMetrics | None = None
    """Of the first sequence."""
    error: AutodeployError | None = None
    """Why the request failed; its outputs hold what came before."""
    embedding: bytes | None = None
    """The pooled hidden state, little-endian float32, of a prompt that was embedded."""

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix cache."""
        return self.metrics.cached_tokens if self.metrics else 0


@dataclass(frozen=True)
class EmbeddingOutput:
    """One vector."""

    embedding: list[float]


@dataclass(frozen=True)
class EmbeddingRequestOutput:
    """What `embed` gives for one prompt."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""
    finished: bool = True
