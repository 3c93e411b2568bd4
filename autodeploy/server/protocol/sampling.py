"""Fields of a request that say how tokens are chosen, and the SamplingParams they become."""

from __future__ import annotations

from typing import Any

from ...runtime.sampling_params import SamplingParams
from ..config import ServerConfig
from ..errors import invalid
from .base import Request, StreamOptions

_AS_THEY_ARE = (
    "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "stop", "stop_token_ids", "include_stop_str_in_output",
    "ignore_eos", "min_tokens", "skip_special_tokens", "bad_words", "allowed_token_ids",
    "prompt_logprobs", "max_tokens",
)  # fmt: skip


class TokenFields(Request):
    """How tokens are chosen, on every endpoint that generates. None: what the checkpoint says, then
    vLLM's default."""

    model: str | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None
    """Told to nobody."""

    # OpenAI's on some endpoints, vLLM's on all.
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None

    # vLLM's extras.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    priority: int = 0
    cache_salt: str | None = None
    """Prefixes are shared with requests of the same salt only; one per tenant keeps them apart."""
    structured_outputs: dict[str, Any] | None = None
    """Fields of StructuredOutputsParams: one of json, regex, choice, grammar and json_object."""
    guided_json: str | dict[str, Any] | None = None
    """Older name of structured_outputs.json, as the next three are of its others."""
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def sampling_params(self, defaults: SamplingParams, **changes: Any) -> SamplingParams:
        """The fields that were given, over `defaults`; `changes` are the endpoint's own.

        Raises:
            SamplingParamsError: a value is out of range, or two contradict each other.
            ApiError: a field cannot be served.
        """
        known = type(self).model_fields
        given = {name: getattr(self, name) for name in _AS_THEY_ARE if name in known}
        given = {name: value for name, value in given.items() if value is not None}
        if self.logit_bias is not None:
            given["logit_bias"] = _biases(self.logit_bias)
        return defaults.clone(**{**given, **changes})

    def check_limits(self, config: ServerConfig) -> None:
        """Refuses what is more than this server does for one request.

        Raises:
            ApiError: 400, with the field's name.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        for name, strings in (("stop", stop), ("bad_words", self.bad_words or [])):
            if len(strings) > config.max_stop_strings:
                raise invalid(
                    f"{name} has {len(strings)} strings; this server takes "
                    f"{config.max_stop_strings}",
                    name,
                )
            longest = max(map(len, strings), default=0)
            if longest > config.max_stop_length:
                raise invalid(
                    f"{name} has a string of {longest} characters; this server takes "
                    f"{config.max_stop_length}",
                    name,
                )


class SamplingFields(TokenFields):
    """What completions and chat have in common."""

    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    response_format: dict[str, Any] | None = None

    # vLLM's extras.
    best_of: int | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None

    def check_limits(self, config: ServerConfig) -> None:
        """As every endpoint's, and those of several sequences."""
        super().check_limits(config)
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise invalid(
                f"best_of={self.best_of} is not served; ask for n sequences and take the best",
                "best_of",
            )
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is allowed only with stream=true", "stream_options")
        _at_most("n", self.n, config.max_n)
        _at_most("prompt_logprobs", self.prompt_logprobs, config.max_logprobs)

    @property
    def sequences_per_prompt(self) -> int:
        return self.n or 1

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def tells_usage_always(self) -> bool:
        """Whether each event of a stream has the usage so far."""
        return self.tells_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )


def check_logprobs(name: str, value: int | None, config: ServerConfig) -> None:
    """Raises ApiError if more candidates are asked for than this server tells."""
    _at_most(name, value, config.max_logprobs)


def _at_most(name: str, value: int | None, most: int) -> None:
    if value is not None and value > most:
        raise invalid(f"{name}={value} is more than this server gives, which is {most}", name)


def _biases(given: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError as error:
        raise invalid(f"logit_bias must map token ids to numbers: {error}", "logit_bias") from error
