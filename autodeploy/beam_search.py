"""Beam search on the front: every step asks the engine for one token of each live beam.

A beam is a request of one token with the log probabilities of the best 2 x width candidates; its
prefix is in the prefix cache from the step before. Twice the width, so that ended candidates
leave enough live ones (as in Hugging Face's and vLLM's search).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .errors import SamplingParamsError
from .prompts import Prompt
from .runtime.sampling_params import SamplingParams
from .runtime.structured_params import StructuredOutputsParams

if TYPE_CHECKING:
    from .llm import LLM


@dataclass(frozen=True)
class BeamSearchParams:
    """How to search.

    Raises:
        SamplingParamsError: a value is out of range.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0
    """Scores are the sum of log probabilities over length ** length_penalty."""
    structured_outputs: StructuredOutputsParams | None = None
    """Only None."""

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise SamplingParamsError(f"{name} must be a positive integer, not {value!r}")
        if self.structured_outputs is not None:
            raise SamplingParamsError(
                "beam search cannot follow structured_outputs: it takes its candidates from the "
                "model's own distribution; use generate, with n for several outputs"
            )
        penalty = self.length_penalty
        if not isinstance(penalty, (int, float)) or not abs(penalty) < 1e3:
            raise SamplingParamsError(
                f"length_penalty must be a number between -1000 and 1000, not {penalty!r}"
            )


@dataclass
class BeamSearchSequence:
    """One continuation."""

    tokens: list[int]
    """Prompt and generated token ids."""
    cum_logprob: float = 0.0
    text: str | None = None
    """Of prompt and generated tokens; None without a tokenizer."""
    finish_reason: str | None = None


@dataclass
class BeamSearchOutput:
    """The best continuations of one prompt, best first."""

    sequences: list[BeamSearchSequence] = field(default_factory=list)


@dataclass
class _Beams:
    prompt: Prompt
    live: list[BeamSearchSequence]
    ended: list[BeamSearchSequence] = field(default_factory=list)


def search(llm: LLM, prompts: list[Prompt], params: BeamSearchParams) -> list[BeamSearchOutput]:
    """Searches all prompts together."""
    searches = [_Beams(p, [BeamSearchSequence(list(p.token_ids))]) for p in prompts]
    eos = set() if params.ignore_eos else set(llm.defaults.eos_token_ids)
    one_token = SamplingParams(
        temperature=0.0, max_tokens=1, logprobs=2 * params.beam_width, ignore_eos=True,
        detokenize=False,
    )  # fmt: skip
    for _ in range(params.max_tokens):
        beams = [(s, beam) for s in searches for beam in s.live]
        if not beams:
            break
        grown = [Prompt(None, b.tokens, len(s.prompt.token_ids)) for s, b in beams]
        outputs = llm.generate(grown, one_token, use_tqdm=False)
        found: dict[int, list[BeamSearchSequence]] = {id(s): [] for s in searches}
        for (owner, beam), output in zip(beams, outputs, strict=True):
            if output.error is not None:
                raise output.error
            candidates = (output.outputs[0].logprobs or [{}])[0]
            for token, logprob in candidates.items():
                found[id(owner)].append(
                    BeamSearchSequence([*beam.tokens, token], beam.cum_logprob + logprob.logprob)
                )
        for owner in searches:
            _select(owner, found[id(owner)], params, eos, llm.max_model_len)
    return [_finish(owner, params, llm.tokenizer) for owner in searches]


def _select(
    owner: _Beams,
    candidates: list[BeamSearchSequence],
    params: BeamSearchParams,
    eos: set[int],
    max_model_len: int,
) -> None:
    """Keeps the best `beam_width` live candidates; those that end among the best are done."""
    candidates.sort(key=lambda c: -c.cum_logprob)
    owner.live = []
    for rank, candidate in enumerate(candidates):
        if len(owner.live) == params.beam_width:
            break
        if candidate.tokens[-1] in eos:
            if rank < params.beam_width:
                candidate.finish_reason = "stop"
                owner.ended.append(candidate)
        else:
            owner.live.append(candidate)
    if owner.live and len(owner.live[0].tokens) >= max_model_len:
        owner.ended += owner.live
        owner.live = []


def _finish(owner: _Beams, params: BeamSearchParams, tokenizer: object) -> BeamSearchOutput:
    prompt_length = len(owner.prompt.token_ids)

    def score(beam: BeamSearchSequence) -> float:
        length = len(beam.tokens) - prompt_length
        return beam.cum_logprob / max(1, length) ** params.length_penalty

    best = sorted([*owner.ended, *owner.live], key=score, reverse=True)[: params.beam_width]
    for beam in best:
        beam.finish_reason = beam.finish_reason or "length"
        if tokenizer is not None:
            beam.text = tokenizer.decode(beam.tokens)  # type: ignore[attr-defined]
    return BeamSearchOutput(best)
