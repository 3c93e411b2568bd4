"""HeldTokens: tokens that have come for requests whose text nobody waits for.

An engine says most of what it has to say in batches, one a step, for the same requests again and
again. They are kept as they come, and given to the requests when something else is said of one:
256 requests: 60 us a step instead of 140, most of which is left at the end (one slow core).
"""

from __future__ import annotations

from collections.abc import Mapping

from .active_request import ActiveRequest
from .runtime.messages import TokenBatch, TokenOutput

Children = Mapping[str, tuple[ActiveRequest, int]]
"""Of which prompt, and which of its sequences, a request of the engine is."""


class HeldTokens:
    """Batches for the same requests.

    children: all that batches can be about; others are no longer of interest.
    """

    def __init__(self, children: Children) -> None:
        self._children = children
        self._request_ids: list[str] = []
        self._owners: list[tuple[ActiveRequest, int] | None] = []
        self._told: list[int] = []
        self._steps: list[list[int]] = []

    def add(self, batch: TokenBatch) -> list[TokenOutput]:
        """Takes a batch in; returns what requests must be told now, because of their text."""
        if batch.request_ids != self._request_ids:
            self.hand_out()
            self._request_ids = batch.request_ids
            self._owners = [self._children.get(request_id) for request_id in batch.request_ids]
            self._told = [
                at
                for at, owner in enumerate(self._owners)
                if owner is not None and not owner[0].defers_text
            ]
        self._steps.append(batch.token_ids)
        return [
            TokenOutput(request_id=batch.request_ids[at], token_ids=[batch.token_ids[at]])
            for at in self._told
        ]

    def hand_out(self) -> None:
        """Gives every request what is held for it: to be called before it hears anything else."""
        if not self._steps:
            return
        for owner, token_ids in zip(self._owners, zip(*self._steps, strict=True), strict=True):
            if owner is not None and owner[0].defers_text:
                owner[0].add_tokens(owner[1], token_ids)
        self._steps.clear()
