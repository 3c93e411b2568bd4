"""What the front and the engine say to each other; the same objects in process and on a socket.

Every message is a msgspec struct, so it crosses a process boundary without pickle.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from autodeploy.custom_ops.cost import Cost

from .sampling_params import SamplingParams


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One candidate's log probability (natural log, after nothing but softmax) and its rank."""

    token_id: int
    logprob: float
    rank: int
    """1 is the most likely token."""


class EngineRequest(msgspec.Struct, kw_only=True, tag="request"):
    """One sequence to generate. `n > 1` and beams are several of these, made by the front."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    eos_token_ids: list[int] = []
    seed: int = 0
    """Resolved by the front; the only source of randomness of this request."""
    priority: int = 0
    """Lower runs first; equal priorities run first come, first served."""
    arrival_time: float = 0.0
    cache_salt: str | None = None
    """Requests share cached prefixes only with requests of the same salt."""
    prefilled: int | None = None
    """Leading tokens that were the prompt, if the others have been generated since; None: all.
    It matters to models whose keys depend on the prompt's length."""
    pooling: str | None = None
    """last or mean: what to make of the prompt's hidden states, if the program returns those."""


class AbortRequest(msgspec.Struct, tag="abort"):
    request_ids: list[str]


class Shutdown(msgspec.Struct, tag="shutdown"):
    pass


class RequestMetrics(msgspec.Struct, kw_only=True):
    """Seconds on the engine host's `time.time` clock; None for what has not happened."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    cached_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix cache."""
    preemptions: int = 0


class TokenOutput(msgspec.Struct, kw_only=True, tag="tokens"):
    """What one step gave one request."""

    request_id: str
    token_ids: list[int]
    logprobs: list[list[TokenLogprob]] | None = None
    """Per new token: the sampled token first, then the top candidates asked for."""
    prompt_logprobs: list[list[TokenLogprob] | None] | None = None
    """Sent once, with the first token; the entry of the first prompt token is None."""
    finish_reason: str | None = None
    """'stop', 'length', 'abort' or None while running."""
    stop_reason: int | str | None = None
    """The stop token id that ended it; None for EOS and for length."""
    metrics: RequestMetrics | None = None
    embedding: bytes | None = None
    """Instead of tokens: the pooled hidden state [hidden], little-endian float32."""


class TokenBatch(msgspec.Struct, tag="batch"):
    """One more token for each of several requests, none of which ended by it.

    Most of what an engine has to say; one object a step costs less than one a token.
    """

    request_ids: list[str] = []
    token_ids: list[int] = []


class RequestFailed(msgspec.Struct, kw_only=True, tag="failed"):
    """A request the engine cannot serve; other requests are untouched."""

    request_id: str
    error: str
    """Name of the exception type of autodeploy's error tree."""
    message: str


class EngineStats(msgspec.Struct, kw_only=True, tag="stats"):
    """One step of the engine, as counters and gauges."""

    step: int = 0
    step_seconds: float = 0.0
    waited_seconds: float = 0.0
    """That the host did nothing but wait for the device, since start."""
    running: int = 0
    waiting: int = 0
    scheduled_tokens: int = 0
    generated_tokens: int = 0
    pages_used: int = 0
    pages_total: int = 0
    prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache, since start."""
    prefix_hits: int = 0
    preemptions: int = 0
    aborted: int = 0
    finished: int = 0
    graph_replays: int = 0
    """Decoding steps that were one launch of a CUDA graph."""
    graph_misses: int = 0
    """Decoding steps for whose number of requests no graph was captured."""
    mixed_replays: int = 0
    """Steps with prompt tokens that were one launch of a CUDA graph."""
    mixed_steps: int = 0
    """On a GPU: steps with prompt tokens that ran without a graph."""


class EngineReady(msgspec.Struct, kw_only=True, tag="ready"):
    """The worker has built its engine."""

    vocab_size: int
    max_model_len: int
    summary: dict[str, str] = {}
    cost: Cost | None = None
    """What a step must read and compute; None: unknown."""
    task: str = "generate"
    """generate, or embed."""
    step_tokens: int = 0
    """Most tokens that one step computes."""
    block_size: int = 0
    """Tokens of a page, the unit in which prefixes are shared."""
    prefix_blocks: int = 0
    """Pages of one sequence that the prefix cache can hold; 0: prefixes are not shared."""


class EngineDied(msgspec.Struct, tag="died"):
    """The engine cannot go on; every open request ends with this message."""

    message: str
    error: str = "EngineDeadError"
    """Name of the exception type of autodeploy's error tree."""


def one_by_one(events: Iterable[EngineEvent]) -> Iterator[EngineEvent]:
    """The same events, each batch of tokens as one message per request."""
    for event in events:
        if isinstance(event, TokenBatch):
            for request_id, token_id in zip(event.request_ids, event.token_ids, strict=True):
                yield TokenOutput(request_id=request_id, token_ids=[token_id])
        else:
            yield event


FromFront = EngineRequest | AbortRequest | Shutdown
EngineEvent = TokenOutput | TokenBatch | RequestFailed | EngineStats | EngineReady | EngineDied
FromEngine = list[EngineEvent]
