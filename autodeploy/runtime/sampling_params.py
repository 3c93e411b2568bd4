"""SamplingParams: how one request is decoded. Names and defaults are vLLM's.

Construction normalises (numpy numbers become Python's, `stop` a list, `top_k=-1` 0) and refuses
what cannot be served, so that the engine and the sampler never meet a senseless value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import msgspec

from autodeploy.errors import SamplingParamsError

from .structured_params import StructuredOutputsParams

LARGEST_INT = 2**31 - 1
MAX_SEQUENCES = 16384


class SamplingParams(msgspec.Struct, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How one request is decoded.

    Raises:
        TypeError: an unknown keyword.
        SamplingParamsError: a value out of range, or two that contradict each other.
    """

    n: int = 1
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """Both subtract from logits of tokens seen in the *output*, once or per occurrence."""
    logit_bias: dict[int, float] | None = None
    bad_words: list[str] | None = None
    bad_words_token_ids: list[list[int]] | None = None
    """Token sequences that must not be completed; the front fills it from `bad_words`."""
    allowed_token_ids: list[int] | None = None
    seed: int | None = None
    logprobs: int | None = None
    """Number of top candidates to report per output token; the sampled one is always there."""
    prompt_logprobs: int | None = None
    stop: list[str] | str | None = None
    """A list once constructed: None becomes the empty one, a string a list of one."""
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    """None: until the context is full."""
    skip_special_tokens: bool = True
    detokenize: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    """What the output's text must match; the output ends when nothing more can follow."""

    def __post_init__(self) -> None:
        self.validate()

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as the list it is after construction."""
        if isinstance(self.stop, str):
            return [self.stop]
        return self.stop or []

    def clone(self, **changes: Any) -> SamplingParams:
        """An independent copy, with some fields replaced; checked like a new one.

        Raises:
            TypeError: an unknown field.
            SamplingParamsError: the result is not valid.
        """
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        return SamplingParams(**{**values, **changes})

    def validate(self) -> None:
        """Normalise and check every field; for those who assign to fields after construction.

        Raises:
            SamplingParamsError: a value of the wrong type, out of range, or contradicting another.
        """
        for name, (low, high, hint) in INT_RANGES.items():
            value = getattr(self, name)
            if value is not None or name not in MAY_BE_NONE:
                setattr(self, name, _integer(name, value, low, high, hint))
        for name, (least, most, hint) in FLOAT_RANGES.items():
            setattr(self, name, _number(name, getattr(self, name), least, most, hint))
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise _wrong_type(name, getattr(self, name), "True or False")
        if self.top_p == 0.0:
            raise SamplingParamsError(
                "top_p=0.0 keeps no token; use a value above 0, or temperature=0 to be greedy"
            )
        self.top_k = max(self.top_k, 0)
        self._normalise_strings()
        self._normalise_token_ids()
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise _wrong_type(
                "structured_outputs", self.structured_outputs, "a StructuredOutputsParams"
            )
        self._refuse_contradictions()

    def _normalise_strings(self) -> None:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        self.stop = [] if stop is None else _strings("stop", stop)
        if self.bad_words is not None:
            self.bad_words = _strings("bad_words", self.bad_words)

    def _normalise_token_ids(self) -> None:
        if self.stop_token_ids is not None:
            self.stop_token_ids = _token_ids("stop_token_ids", self.stop_token_ids)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise SamplingParamsError(
                    "allowed_token_ids is empty, so no token could be sampled; "
                    "list at least one id, or leave it None to allow all"
                )
        if self.bad_words_token_ids is not None:
            self.bad_words_token_ids = _sequences("bad_words_token_ids", self.bad_words_token_ids)
        if self.logit_bias is not None:
            self.logit_bias = _biases(self.logit_bias)

    def _refuse_contradictions(self) -> None:
        if self.greedy and self.n > 1:
            raise SamplingParamsError(
                f"n={self.n} with temperature=0 would give the same text {self.n} times; "
                "set n=1, or a temperature above 0"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingParamsError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}; "
                "raise max_tokens or lower min_tokens"
            )
        if self.stop and not self.detokenize:
            raise SamplingParamsError(
                "stop strings are searched in the text, which detokenize=False leaves out; "
                "set detokenize=True, or use stop_token_ids"
            )
        if self.structured_outputs is not None and self.ignore_eos:
            raise SamplingParamsError(
                "structured_outputs ends with an end-of-sequence token, which ignore_eos=True "
                "would go on after; leave out one of the two"
            )
        if self.allowed_token_ids is None:
            return
        allowed = set(self.allowed_token_ids)
        words = self.bad_words_token_ids or []
        both = sorted(allowed & {word[0] for word in words if len(word) == 1})
        if both:
            raise SamplingParamsError(
                f"token {both[0]} is in allowed_token_ids and forbidden by bad_words_token_ids; "
                "take it out of one of the two"
            )
        if self.min_tokens and allowed <= set(self.stop_token_ids or []):
            raise SamplingParamsError(
                f"every id of allowed_token_ids is in stop_token_ids, which min_tokens="
                f"{self.min_tokens} forbids at first; allow another id or set min_tokens=0"
            )


INT_RANGES: dict[str, tuple[int, int, str]] = {
    "n": (1, MAX_SEQUENCES, "ask for at least one sequence, and for very many in several requests"),
    "top_k": (-1, LARGEST_INT, "use 0 or -1 to keep all tokens"),
    "min_tokens": (0, LARGEST_INT, "use 0 for no minimum"),
    "seed": (-(2**63), 2**64 - 1, "use a 64-bit integer, or None for a random one"),
    "logprobs": (0, LARGEST_INT, "use 0 for the sampled token only, None for no logprobs"),
    "prompt_logprobs": (0, LARGEST_INT, "use 0 for the prompt's tokens only, None for none"),
    "max_tokens": (1, LARGEST_INT, "ask for at least one token, or None to fill the context"),
}
MAY_BE_NONE = frozenset({"seed", "logprobs", "prompt_logprobs", "max_tokens"})
# Outside these bounds a float32 logit overflows (penalties) or the value has no meaning.
FLOAT_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0.0, math.inf, "use 0 to be greedy, 1 for the model's own distribution"),
    "top_p": (0.0, 1.0, "use 1 to keep all tokens"),
    "min_p": (0.0, 1.0, "use 0 to keep all tokens"),
    "repetition_penalty": (1e-3, 1e3, "use 1 for no penalty"),
    "presence_penalty": (-2.0, 2.0, "use 0 for no penalty"),
    "frequency_penalty": (-2.0, 2.0, "use 0 for no penalty"),
}
FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize")


def _integer(name: str, value: object, low: int, high: int, hint: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise _wrong_type(name, value, "an integer")
    number = int(value)
    if not low <= number <= high:
        shown = number if abs(number) < 10**30 else f"a number of {len(hex(number)) * 4} bits"
        raise SamplingParamsError(f"{name}={shown} is outside [{low}, {high}]; {hint}")
    return number


def _number(name: str, value: object, low: float, high: float, hint: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _wrong_type(name, value, "a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high:
        limits = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"at least {low:g}"
        raise SamplingParamsError(f"{name}={number!r} must be a finite number {limits}; {hint}")
    return number


def _strings(name: str, values: object) -> list[str]:
    strings = list(_listed(name, values, "strings"))
    for value in strings:
        if not isinstance(value, str):
            raise _wrong_type(f"an entry of {name}", value, "a string")
        if not value:
            raise SamplingParamsError(f"{name} has an empty string, which is everywhere; drop it")
    return strings


def _token_ids(name: str, values: object) -> list[int]:
    hint = "use ids of the tokenizer's vocabulary"
    entry = f"an entry of {name}: token id"
    return [_integer(entry, v, 0, LARGEST_INT, hint) for v in _listed(name, values, "token ids")]


def _sequences(name: str, values: object) -> list[list[int]]:
    words = [_token_ids(name, word) for word in _listed(name, values, "lists of token ids")]
    if [] in words:
        raise SamplingParamsError(f"{name} has an empty sequence, which forbids nothing; drop it")
    return words


def _biases(values: object) -> dict[int, float]:
    if not isinstance(values, Mapping):
        raise _wrong_type("logit_bias", values, "a dict from token id to number")
    ids = _token_ids("logit_bias", list(values))
    hint = "use bad_words or allowed_token_ids to forbid a token"
    return {
        token_id: _number(f"logit_bias[{token_id}]", bias, -100.0, 100.0, hint)
        for token_id, bias in zip(ids, values.values(), strict=True)
    }


def _listed(name: str, values: object, of: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(values, list | tuple):
        raise _wrong_type(name, values, f"a list of {of}")
    return values


def _wrong_type(name: str, value: object, wanted: str) -> SamplingParamsError:
    return SamplingParamsError(
        f"{name} is {value!r:.80}, a {type(value).__name__}; it must be {wanted}"
    )
