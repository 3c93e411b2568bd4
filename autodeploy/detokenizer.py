"""Turning a growing list of token ids into text, a piece at a time, without ever taking back.

A token may end in the middle of a character, and a tokenizer may write a word's leading space
only when something stands before it. So a few tokens of context are decoded again with each new
one, and text is given out only when it can no longer change; stop strings hold text back too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .errors import InvalidRequestError

# Tokens of the prompt that are decoded together with the first new ones.
_CONTEXT = 6
# A character spans a few tokens at most. Bytes that make none after this many are given out as
# they are, and tokens that make no text (skipped ones) are dropped: the window stays small.
_PATIENCE = 32


def decode(tokenizer: Any, token_ids: Sequence[int], **options: bool) -> str:
    """The tokenizer's text.

    Raises:
        InvalidRequestError: it has none; a model may know more token ids than its tokenizer.
    """
    try:
        text: str = tokenizer.decode(token_ids, **options)
    except Exception as error:  # each kind of tokenizer has its own for an unknown id
        last = list(token_ids[-1:])
        raise InvalidRequestError(
            f"the tokenizer cannot decode tokens up to {last} ({type(error).__name__}: {error}); "
            "use detokenize=False, or allowed_token_ids that it knows"
        ) from error
    return text


def piece_decoder(tokenizer: Any, skip_special_tokens: bool) -> Callable[[list[int]], str]:
    """What decodes a few tokens of `tokenizer`, as `decode` without cleaning up spaces.

    transformers' own `decode` first finds out what it was given, which takes as long as decoding;
    a tokenizer whose class changes neither of its two methods is asked directly.
    """
    from transformers import PreTrainedTokenizerFast

    kind, plain = type(tokenizer), PreTrainedTokenizerFast
    if getattr(kind, "decode", None) is plain.decode and kind._decode is plain._decode:
        tokenizer = tokenizer.backend_tokenizer
        return lambda ids: decode(tokenizer, ids, skip_special_tokens=skip_special_tokens)
    return lambda ids: decode(
        tokenizer,
        ids,
        skip_special_tokens=skip_special_tokens,
        clean_up_tokenization_spaces=False,
    )


class Detokenizer:
    """Text of one sequence.

    tokenizer: has `decode`; None gives no text. stop: strings that end the sequence.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.text = ""
        """All text so far that is final."""
        self.stop_reason: str | None = None
        """The stop string that was found."""
        self._tokenizer = tokenizer
        if tokenizer is not None:
            self._decode = piece_decoder(tokenizer, skip_special_tokens)
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._tokens = self._end_of(list(prompt_token_ids))
        # Tokens from `_start` on are decoded; the text of those before `_done` is out. Both only
        # ever stand where a character ends: half of one would spoil the text around it.
        self._start = 0
        self._done = len(self._tokens)
        self._made = 0
        self._held = ""
        self._longest_stop = max(map(len, self._stop), default=0)

    def append(self, token_ids: Sequence[int]) -> int:
        """Adds tokens; returns how many of them belong to the sequence.

        Fewer than given when a stop string was completed before the last.
        """
        for count, token_id in enumerate(token_ids, 1):
            self._made += 1
            self._tokens.append(token_id)
            if self._tokenizer is not None:
                self._held += self._new_text(final=False)
                if self._made <= self._min_tokens:
                    self._release(keep=0)
                elif self._find_stop():
                    return count
        self._release(keep=self._partial_stop() if self._made > self._min_tokens else 0)
        return len(token_ids)

    def finish(self) -> str:
        """The rest of the text, when no token will follow; returns all of it."""
        if self._tokenizer is not None and self.stop_reason is None:
            self._held += self._new_text(final=True)
            if not self._find_stop():
                self._release(keep=0)
        return self.text

    def _new_text(self, final: bool) -> str:
        """Text of the tokens since `_done`, if it is whole; empty while a character is open."""
        before = self._decode(self._tokens[self._start : self._done])
        after = self._decode(self._tokens[self._start :])
        silent = len(after) <= len(before)
        if not final and (silent or after.endswith("�")):
            if len(self._tokens) - self._done < _PATIENCE:
                return ""
            if silent:
                del self._tokens[self._done :]
                return ""
        self._start, self._done = self._done, len(self._tokens)
        return after[len(before) :]

    def _end_of(self, prompt: list[int]) -> list[int]:
        """The last few tokens of a prompt, from the start of a character on."""
        size = _CONTEXT
        while self._tokenizer is not None and size < len(prompt):
            if not self._decode(prompt[-size:]).startswith("�"):
                return prompt[-size:]
            size *= 2
        return prompt[-size:]

    def _find_stop(self) -> bool:
        # Text that could begin a stop string is held, so it is never looked for in `text`.
        found = [(at + len(s), at, s) for s in self._stop if (at := self._held.find(s)) >= 0]
        if not found:
            return False
        # The first to be complete, as if the text had come character by character.
        _, at, stop = min(found)
        self.text += self._held[: at + (len(stop) if self._include_stop else 0)]
        self._held = ""
        self.stop_reason = stop
        return True

    def _partial_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        for size in range(min(self._longest_stop - 1, len(self._held)), 0, -1):
            end = self._held[-size:]
            if any(stop.startswith(end) for stop in self._stop):
                return size
        return 0

    def _release(self, keep: int) -> None:
        cut = len(self._held) - keep
        self.text += self._held[:cut]
        self._held = self._held[cut:]
