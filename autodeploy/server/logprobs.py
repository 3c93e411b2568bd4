"""Log probabilities in the three shapes that clients know."""

from __future__ import annotations

from typing import Any

from ..detokenizer import decode
from ..outputs import Logprob
from .protocol.chat import ChatLogprobs, TokenLogprob, TopLogprob
from .protocol.completions import CompletionLogprobs

# JSON has no infinity; vLLM's number for a token that cannot be.
_LEAST = -9999.0


def chat_logprobs(entries: list[dict[int, Logprob]] | None, top: int) -> ChatLogprobs:
    """Per token of `entries`: the sampled one and the `top` likeliest."""
    content = []
    for entry in entries or []:
        sampled, *_ = entry.values()
        ranked = sorted(entry.values(), key=lambda each: each.rank or 0)
        likeliest = [each for each in ranked if each.rank is not None and each.rank <= top]
        own = _top(sampled)
        content.append(
            TokenLogprob(
                token=own.token, logprob=own.logprob, bytes=own.bytes,
                top_logprobs=[_top(each) for each in likeliest[:top]],
            )
        )  # fmt: skip
    return ChatLogprobs(content=content)


def completion_logprobs(
    token_ids: list[int],
    entries: list[dict[int, Logprob] | None],
    offset: int,
    tokenizer: Any,
    silent: frozenset[int] = frozenset(),
) -> tuple[CompletionLogprobs, int]:
    """Parallel lists for `token_ids`, and the offset of what follows.

    offset: characters of the choice's text before them. silent: tokens the text leaves out. The
    first token of a prompt has no entry: nothing predicts it.
    """
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        own = None if entry is None else entry[token_id]
        text = decode(tokenizer, [token_id]) if own is None else _text(own)
        tokens.append(text)
        offsets.append(offset)
        offset += 0 if token_id in silent else len(text)
        values.append(None if own is None else _finite(own.logprob))
        tops.append(None if entry is None else _by_text(entry))
    made = CompletionLogprobs(
        tokens=tokens, token_logprobs=values, top_logprobs=tops, text_offset=offsets
    )
    return made, offset


def prompt_logprobs(
    entries: list[dict[int, Logprob] | None],
) -> list[dict[str, Any] | None]:
    """vLLM's shape: per prompt token a map of token ids."""
    return [
        None
        if entry is None
        else {
            str(token_id): {
                "logprob": _finite(each.logprob), "rank": each.rank,
                "decoded_token": each.decoded_token,
            }
            for token_id, each in entry.items()
        }
        for entry in entries
    ]  # fmt: skip


def _by_text(entry: dict[int, Logprob]) -> dict[str, float]:
    found: dict[str, float] = {}
    for each in entry.values():
        text, value = _text(each), _finite(each.logprob)
        # Several tokens may look alike, such as parts of characters.
        found[text] = max(value, found.get(text, value))
    return found


def _top(each: Logprob) -> TopLogprob:
    text = _text(each)
    return TopLogprob(token=text, logprob=_finite(each.logprob), bytes=list(text.encode()))


def _text(each: Logprob) -> str:
    return each.decoded_token or ""


def _finite(value: float) -> float:
    return max(value, _LEAST)
