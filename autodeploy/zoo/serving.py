"""Serving conditions for one model: what the engine gives, beside the plain model.

Twelve ragged requests arrive at different steps; prompts run in chunks of 7 tokens over pages of
4; every third shares a prefix; pages are so few that at least one request is preempted. The plain
model then runs once over each prompt and its answer, without a cache: every token must be its
argmax, and its log probability the same.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from autodeploy.custom_ops.contract import CacheGroup
from autodeploy.runtime.engine import EngineConfig, EngineCore
from autodeploy.runtime.messages import (
    EngineRequest,
    EngineStats,
    RequestFailed,
    TokenOutput,
    one_by_one,
)
from autodeploy.runtime.sampling_params import SamplingParams
from autodeploy.runtime.scheduler import SchedulerConfig
from autodeploy.transforms.capture.module_probe import plain_model

REQUESTS = 12
NEAR_TIE = 1e-3
"""Logits closer than this, in units of their spread, are one choice."""
NO_REPETITION = 1000.0
"""A penalty under which no token comes twice."""
_PREFIX = 9
_LONGEST = 9 + 24 + 12
_PAGE_SIZE = 4
_CHUNK = 7
_MOST_STEPS = 3000


@dataclass(frozen=True)
class Served:
    """How the answers compare, and what the engine had to do for them."""

    wrong_tokens: int
    """Tokens that are not the plain model's choice, near ties left out."""
    tokens: int
    logprob_error: float
    """Largest difference of a chosen token's log probability."""
    preemptions: int
    prefix_hits: int


@dataclass
class Request:
    """One request of the workload, and what the engine answered."""

    prompt: list[int]
    count: int
    """Tokens asked for."""
    arrival: int
    """The step at which it arrives."""
    penalty: float = NO_REPETITION
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """What each token was chosen by, from logits [count, vocab] of the positions before."""
        scores = logits.clone()
        for position, row in enumerate(scores):
            seen = torch.tensor(self.prompt + self.tokens[:position])
            penalised = row[seen]
            row[seen] = penalised.where(penalised < 0, penalised / self.penalty**2) * self.penalty
        return scores


def serve(
    model: nn.Module,
    runner: Any,
    implementation: str | None = None,
    *,
    causal: bool = True,
    seed: int = 1,
) -> Served:
    """Serves the workload with `runner` and compares it with `model`, as `deploy` would run it.

    implementation: of attention in the plain model; None: its own choice. causal: one forward
    of the plain model over a request gives the logits of all its positions.

    Raises:
        RuntimeError: the engine failed a request or does not come to an end.
    """
    requests, stats = answers(runner, seed)
    wrong, error = 0, 0.0
    for request in requests:
        logits = plain_logits(model, request, implementation, causal)
        rows = zip(logits, request.scores(logits), request.tokens, request.logprobs, strict=True)
        for row, scores, token, found in rows:
            error = max(error, abs(float(row.log_softmax(-1)[token]) - found))
            wrong += int(float(scores.max() - scores[token]) > NEAR_TIE * float(row.std()))
    tokens = sum(len(r.tokens) for r in requests)
    return Served(wrong, tokens, error, stats.preemptions, stats.prefix_hits)


def answers(
    runner: Any,
    seed: int = 1,
    *,
    penalties: Sequence[float] = (NO_REPETITION,),
    overlap: bool | None = None,
) -> tuple[list[Request], EngineStats]:
    """The workload with the answers of an engine around `runner`, and what that had to do.

    penalties: on repetition, of the requests in turn. overlap: as in `EngineConfig`.

    Raises:
        RuntimeError: the engine failed a request or does not come to an end.
    """
    requests = _workload(runner.contract.vocab_size, seed, penalties)
    scheduler = SchedulerConfig(
        max_num_seqs=6,
        max_prefill_chunk=_CHUNK,
        page_size=_PAGE_SIZE,
        max_model_len=_LONGEST + 3,
    )
    num_pages = _scarce_pages(runner.contract.token_groups)
    config = EngineConfig(scheduler=scheduler, num_pages=num_pages, overlap=overlap)
    engine = EngineCore(runner, config)
    _run(engine, requests)
    return requests, engine.stats()


def _scarce_pages(groups: Sequence[CacheGroup]) -> int | None:
    """Pages for one request and a third of another; None: the model keeps nothing per token."""
    if not groups:
        return None
    kept = max(
        min(_LONGEST + 3, (group.window or _LONGEST) + _CHUNK + _PAGE_SIZE) for group in groups
    )
    return 4 * math.ceil(kept / _PAGE_SIZE) // 3


def _workload(vocab_size: int, seed: int, penalties: Sequence[float]) -> list[Request]:
    source = random.Random(seed)
    # Low ids are often padding and the like, which some models treat in a way of their own.
    low = min(8, vocab_size // 2)
    # Each token once in a request, as far as there are enough: equal tokens can make equal
    # scores, and a top-k among equals is anyone's.
    known = range(low, vocab_size)
    prefix = source.sample(known, _PREFIX)
    rest = [token for token in known if token not in prefix]
    requests = []
    for index in range(REQUESTS):
        own = source.sample(rest, source.randint(2, 24))
        prompt = (prefix if index % 3 == 0 else []) + own
        count, arrival = source.randint(3, 12), source.randint(0, 12)
        requests.append(Request(prompt, count, arrival, penalties[index % len(penalties)]))
    return requests


def _run(engine: EngineCore, requests: list[Request]) -> None:
    waiting = sorted(range(len(requests)), key=lambda index: requests[index].arrival)
    for step in range(_MOST_STEPS):
        while waiting and requests[waiting[0]].arrival <= step:
            index = waiting.pop(0)
            params = SamplingParams(
                temperature=0, max_tokens=requests[index].count, ignore_eos=True, logprobs=0,
                repetition_penalty=requests[index].penalty,
            )  # fmt: skip
            prompt = requests[index].prompt
            engine.add(EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=params))
        for output in one_by_one(engine.step()):
            if isinstance(output, RequestFailed):
                raise RuntimeError(f"the engine failed a request: {output.message}")
            if isinstance(output, TokenOutput):
                request = requests[int(output.request_id)]
                request.tokens += output.token_ids
                request.logprobs += [entry[0].logprob for entry in output.logprobs or []]
        if not waiting and not engine.has_work:
            return
    raise RuntimeError(f"the engine has work left after {_MOST_STEPS} steps")


def plain_logits(
    model: nn.Module, request: Request, implementation: str | None, causal: bool = True
) -> torch.Tensor:
    """[count, vocab] float32 on the CPU, of the positions that chose the request's tokens."""
    device = next(model.parameters()).device
    ids = torch.tensor([request.prompt + request.tokens], device=device)
    begin, end = len(request.prompt), ids.shape[1]
    with plain_model(model, implementation):
        if causal:
            rows = model(input_ids=ids, use_cache=False).logits[0, begin - 1 : -1]
        else:
            parts = [ids[:, :n] for n in range(begin, end)]
            rows = torch.stack([model(input_ids=p, use_cache=False).logits[0, -1] for p in parts])
    logits: torch.Tensor = rows.float().cpu()
    return logits
