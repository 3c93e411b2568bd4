"""What a request changes in its own logits before sampling: penalties, biases, forbidden tokens.

The order is: repetition penalty (prompt and output), presence and frequency penalty (output),
logit_bias, allowed_token_ids, structured_outputs, bad words, min_tokens. Each means what Hugging
Face's processor of that name means, presence and frequency what OpenAI's API says. A bad word is
honoured even if it is an end-of-sequence token (Hugging Face drops those), and as soon as the text
ends with its prefix.

State per row grows by one token in constant time; a step costs as many numbers as the row has
distinct tokens, and all rows of a step share one scatter per rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autodeploy.custom_ops.op import Choice
from autodeploy.custom_ops.sampling import mask_logits
from autodeploy.errors import SamplingParamsError, UnknownTokenError

from .constraints import Constraint
from .messages import EngineRequest
from .sampling import FORBIDDEN
from .sampling_params import SamplingParams
from .staging import send

NO_TOKENS = np.empty(0, dtype=np.int64)


class TokenCounts:
    """How often each token seen occurs in the output; tokens of the prompt start at 0."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._ids = np.unique(np.asarray(prompt, dtype=np.int64))
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._place = {token_id: place for place, token_id in enumerate(self._ids.tolist())}

    def append(self, token_id: int) -> None:
        place = self._place.setdefault(token_id, len(self._place))
        if place == len(self._ids):
            room = max(64, 2 * place)
            self._ids = np.resize(self._ids, room)
            self._counts = np.concatenate([self._counts, np.zeros(room - place, np.float32)])
        if place == len(self._place) - 1:
            self._ids[place] = token_id
        self._counts[place] += 1.0

    @property
    def ids(self) -> np.ndarray:
        """Distinct tokens, int64."""
        return self._ids[: len(self._place)]

    @property
    def counts(self) -> np.ndarray:
        """Occurrences of `ids` in the output, float32."""
        return self._counts[: len(self._place)]


class BadWords:
    """Token sequences that must not be completed, found by the last token of their prefix."""

    def __init__(self, words: Iterable[Sequence[int]], history: Sequence[int]) -> None:
        self.always = NO_TOKENS
        self._endings: dict[int, list[tuple[list[int], int]]] = {}
        singles = []
        longest = 0
        for word in words:
            if len(word) == 1:
                singles.append(word[0])
                continue
            prefix = list(word[:-1])
            self._endings.setdefault(prefix[-1], []).append((prefix, word[-1]))
            longest = max(longest, len(prefix))
        self.always = np.array(singles, dtype=np.int64)
        self._longest = longest
        self._tail = list(history[-longest:]) if longest else []

    def append(self, token_id: int) -> None:
        if self._longest:
            self._tail.append(token_id)
            del self._tail[: -self._longest]

    def forbidden(self) -> np.ndarray:
        """Tokens that would complete a word now, int64."""
        if not self._tail or self._tail[-1] not in self._endings:
            return self.always
        last = [
            token_id
            for prefix, token_id in self._endings[self._tail[-1]]
            if self._tail[-len(prefix) :] == prefix
        ]
        return np.concatenate([self.always, np.array(last, dtype=np.int64)])


class LogitRules:
    """The rules of one request and the part of its history that they need."""

    def __init__(self, request: EngineRequest, vocab_size: int) -> None:
        """Raises UnknownTokenError or SamplingParamsError for rules that cannot be followed."""
        params = request.params
        refuse_unknown_tokens(params, vocab_size)
        if params.bad_words and params.bad_words_token_ids is None:
            raise SamplingParamsError(
                f"bad_words of request {request.request_id} have no token ids; "
                "fill bad_words_token_ids with the tokenizer"
            )
        self.repetition = params.repetition_penalty
        self.presence = params.presence_penalty
        self.frequency = params.frequency_penalty
        self.counts: TokenCounts | None = None
        if self.repetition != 1.0 or self.presence or self.frequency:
            prompt = request.prompt_token_ids if self.repetition != 1.0 else []
            _refuse_outside(f"the prompt of request {request.request_id}", prompt, vocab_size)
            self.counts = TokenCounts(prompt)
        bias = params.logit_bias or {}
        self.bias_ids = np.fromiter(bias.keys(), dtype=np.int64, count=len(bias))
        self.bias_values = np.fromiter(bias.values(), dtype=np.float32, count=len(bias))
        self.allowed = None
        if params.allowed_token_ids is not None:
            self.allowed = np.unique(np.array(params.allowed_token_ids, dtype=np.int64))
        self.bad_words = BadWords(params.bad_words_token_ids or [], request.prompt_token_ids)
        self.bad_words_given = bool(params.bad_words_token_ids)
        self.constraint: Constraint | None = None
        """Of structured_outputs; whoever samples tells it the tokens."""
        ends = {*request.eos_token_ids, *(params.stop_token_ids or [])}
        self.ends = np.array(sorted(t for t in ends if 0 <= t < vocab_size), dtype=np.int64)
        self.ends_after = params.min_tokens if len(self.ends) else 0

    def append(self, token_id: int) -> None:
        """Take note of one more output token."""
        self.ends_after -= 1
        self.bad_words.append(token_id)
        if self.counts is not None:
            self.counts.append(token_id)

    @property
    def active(self) -> bool:
        """Whether the next logits may have to change."""
        return bool(
            self.ends_after > 0
            or self.counts is not None
            or len(self.bias_ids)
            or self.allowed is not None
            or self.bad_words_given
            or self.constraint is not None
        )

    def why_none(self) -> str:
        """A sentence for a token that cannot be chosen because all are forbidden."""
        if self.constraint is not None and self.constraint.error is not None:
            return f"its structured_outputs cannot be followed further: {self.constraint.error}"
        return FORBIDDEN

    def forbidden(self) -> np.ndarray:
        """Tokens that must not come next, int64; `allowed` not counted."""
        words = self.bad_words.forbidden()
        return np.concatenate([words, self.ends]) if self.ends_after > 0 else words


def apply_rules(logits: Tensor, rules: dict[int, LogitRules]) -> None:
    """Change row `i` of logits [N, V] float32, contiguous, by `rules[i]`, in place.

    Does not wait for the device.
    """
    vocab = logits.shape[1]
    flat = logits.view(-1)

    def on_device(parts: list[np.ndarray]) -> Tensor:
        return send(np.concatenate(parts), logits.device)

    counted = {at: rule for at, rule in rules.items() if rule.counts is not None}
    if counted:
        _penalise(flat, vocab, counted)
    biased = {at: rule for at, rule in rules.items() if len(rule.bias_ids)}
    if biased:
        index = on_device([at * vocab + rule.bias_ids for at, rule in biased.items()])
        flat[index] += on_device([rule.bias_values for rule in biased.values()])
    limited = {at: rule.allowed for at, rule in rules.items() if rule.allowed is not None}
    if limited:
        index = on_device([at * vocab + allowed for at, allowed in limited.items()])
        allowed_logits = flat[index]
        logits.index_fill_(0, on_device([np.array(list(limited), dtype=np.int64)]), -torch.inf)
        flat[index] = allowed_logits
    constrained = {at: r.constraint for at, r in rules.items() if r.constraint is not None}
    if constrained:
        every = list(constrained.values())
        bits = send(every[0].table.take(every), logits.device)
        mask_function(logits.device)(
            logits, bits, on_device([np.array(list(constrained), dtype=np.int64)])
        )
    forbidden = on_device([at * vocab + rule.forbidden() for at, rule in rules.items()])
    flat.index_fill_(0, forbidden, -torch.inf)


@cache
def mask_function(device: torch.device) -> Any:
    """The implementation of `mask_logits` for a device."""
    return mask_logits.choose(Choice(device, {})).function


def _penalise(flat: Tensor, vocab: int, rules: dict[int, LogitRules]) -> None:
    index, divisor, subtracted = [], [], []
    for at, rule in rules.items():
        assert rule.counts is not None
        counts = rule.counts.counts
        index.append(at * vocab + rule.counts.ids)
        divisor.append(np.full(len(counts), rule.repetition, dtype=np.float32))
        subtracted.append(rule.frequency * counts + rule.presence * (counts > 0))
    places = send(np.concatenate(index), flat.device)
    by = send(np.concatenate(divisor), flat.device)
    less = send(np.concatenate(subtracted, dtype=np.float32), flat.device)
    seen = flat[places]
    flat[places] = torch.where(seen < 0, seen * by, seen / by) - less


def refuse_unknown_tokens(params: SamplingParams, vocab_size: int) -> None:
    """Raise UnknownTokenError if `params` speaks of a token id that is not below `vocab_size`.

    Stop tokens are free to be unknown: a token that cannot be sampled cannot stop anything.
    """
    _refuse_outside("logit_bias", params.logit_bias or (), vocab_size)
    _refuse_outside("allowed_token_ids", params.allowed_token_ids or (), vocab_size)
    for word in params.bad_words_token_ids or ():
        _refuse_outside("bad_words_token_ids", word, vocab_size)


def _refuse_outside(what: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise UnknownTokenError(
                f"{what} has token {token_id}, outside the vocabulary of {vocab_size}; "
                "use ids of this model's tokenizer"
            )
