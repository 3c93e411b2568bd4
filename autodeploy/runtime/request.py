"""RequestState: what the engine knows about one live request.

Tokens lie in one growing buffer, prompt first; the scheduler sees only how many are known and
how many the caches hold. A preempted request keeps its tokens and its sampler row.
"""

from __future__ import annotations

import numpy as np

from autodeploy.custom_ops.contract import LengthRule

from .messages import EngineRequest, RequestMetrics, TokenLogprob
from .pages import page_hash, root_hash


class RequestState:
    """A request from `EngineCore.add` to its last output.

    Args:
        request: as the front sent it, valid.
        arrival: counts up; earlier requests of the same priority go first.
        row: its row in the sampler.
        max_model_len: tokens, prompt included, at which it ends by length.
        lengths: how its keys depend on the length of its prompt; None if they do not.
    """

    __slots__ = (
        "_buffer",
        "computed",
        "eos_token_ids",
        "finished",
        "hashes",
        "key",
        "known",
        "lengths",
        "limit",
        "metrics",
        "min_known",
        "plain",
        "prefilled",
        "prompt_logprobs",
        "prompt_tokens",
        "request",
        "request_id",
        "row",
        "slot",
        "stop_token_ids",
        "stops",
        "unresolved",
        "uses",
    )

    def __init__(
        self,
        request: EngineRequest,
        arrival: int,
        row: int,
        max_model_len: int,
        lengths: LengthRule | None = None,
    ) -> None:
        params = request.params
        self.request = request
        self.request_id = request.request_id
        self.plain = False
        """Whether its next token, unless it is the last, is all there is to report of it."""
        self.key = (request.priority, arrival)
        """Orders requests: smaller goes first, larger is preempted first."""
        self.row = row
        self.slot = -1
        """Its number among running requests; -1 while it waits."""
        self.finished = False
        self.prompt_tokens = self.known = len(request.prompt_token_ids)
        self.lengths = lengths
        self.prefilled = self._count_prefilled()
        """Leading tokens whose keys are those of one prompt, however often they are computed."""
        self._buffer = np.array(request.prompt_token_ids, dtype=np.int64)
        self.computed = 0
        """Leading tokens whose keys, values and states are in the caches."""
        self.limit = max_model_len
        if params.max_tokens is not None:
            self.limit = min(max_model_len, self.prompt_tokens + params.max_tokens)
        self.min_known = self.prompt_tokens + params.min_tokens
        self.eos_token_ids = frozenset() if params.ignore_eos else frozenset(request.eos_token_ids)
        self.stop_token_ids = frozenset(params.stop_token_ids or ())
        self.stops = self.eos_token_ids | self.stop_token_ids
        self.unresolved = False
        """Whether the newest token is still on the device: known to be one, not which."""
        self.uses = 0
        """Steps in flight that compute tokens of it."""
        self.hashes: list[bytes] = []
        """One per full page of known tokens, as far as `hash_pages` has been asked."""
        self.prompt_logprobs: list[list[TokenLogprob] | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        self.metrics = RequestMetrics(arrival_time=request.arrival_time)

    @property
    def tokens(self) -> np.ndarray:
        """All known tokens, [known] int64: a view, valid until the next `append`."""
        return self._buffer[: self.known]

    @property
    def decided(self) -> bool:
        """Whether its last token is on the way: there is nothing left to compute for it."""
        return self.unresolved and self.known >= self.limit

    @property
    def decodes(self) -> bool:
        """Whether one token is left to compute: the newest, or a prompt's last."""
        return self.known - self.computed == 1

    @property
    def reusable(self) -> int:
        """Leading tokens that need not be computed if a cache has them.

        One token is always computed, and so are those whose prompt logprobs are still missing.
        """
        return self.next_prompt_row if self.missing_prompt_logprobs else self.known - 1

    @property
    def missing_prompt_logprobs(self) -> int:
        """Prompt tokens whose logprobs are asked for and not there yet."""
        return 0 if self.prompt_logprobs is None else self.prompt_tokens - len(self.prompt_logprobs)

    @property
    def next_prompt_row(self) -> int:
        """The position whose logits score the first prompt token without logprobs."""
        return len(self.prompt_logprobs or (None,)) - 1

    @property
    def key_length(self) -> int:
        """What tells its keys from those of equal tokens in other requests; 1 if nothing does."""
        return 1 if self.lengths is None else self.lengths.alike(self.prefilled)

    @property
    def newest(self) -> int:
        """The last known token."""
        return int(self._buffer[self.known - 1])

    def append(self, token_id: int) -> None:
        """One more known token, not computed yet."""
        self.expect()
        self.resolve(token_id)

    def expect(self) -> None:
        """One more token, of which the device knows which it is."""
        self.known += 1
        self.unresolved = True
        self.make_room()

    def make_room(self, tokens: int = 0) -> None:
        """Of the buffer: for `tokens` tokens, and all known ones."""
        size, tokens = len(self._buffer), max(tokens, self.known)
        if tokens > size:
            grown = np.empty(max(tokens, min(self.limit, 2 * size + 16)), dtype=np.int64)
            grown[:size] = self._buffer
            self._buffer = grown

    def write(self, position: int, token_ids: np.ndarray) -> None:
        """Says which tokens are there from a position on."""
        end = position + len(token_ids)
        self.make_room(end)
        self._buffer[position:end] = token_ids

    def resolve(self, token_id: int) -> int:
        """Says which token the newest is; returns how many are known."""
        known = self.known
        self._buffer[known - 1] = token_id
        self.unresolved = False
        return known

    def starts_again(self) -> bool:
        """Whether the newest token makes all keys others than they were; True once."""
        before, self.prefilled = self.prefilled, self._count_prefilled()
        if self.prefilled == before:
            return False
        self.hashes = []
        return True

    def _count_prefilled(self) -> int:
        first = self.request.prefilled or self.prompt_tokens
        return first if self.lengths is None else self.lengths.prompt_tokens(first, self.known)

    def hash_pages(self, end: int, page_size: int) -> list[bytes]:
        """Hashes of at least the full pages among the first `end` tokens; each computed once."""
        for column in range(len(self.hashes), end // page_size):
            parent = (
                self.hashes[-1] if column else root_hash(self.request.cache_salt, self.key_length)
            )
            page = self._buffer[column * page_size : (column + 1) * page_size]
            self.hashes.append(page_hash(parent, page))
        return self.hashes

    def finish_reason(self) -> tuple[str | None, int | None]:
        """Why the newest token ends the request, with the stop token id if that is why."""
        token_id = self.newest
        if self.known >= self.min_known:
            if token_id in self.eos_token_ids:
                return "stop", None
            if token_id in self.stop_token_ids:
                return "stop", token_id
        return ("length" if self.known >= self.limit else None), None
