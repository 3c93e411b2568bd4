"""The ladder: from a live model to a runner, as high as the model can be served exactly.

(1) packed and cached, (2) one sequence at a time with the model's own cache, (3) recomputed from
the first token at every step. Anything below (1) is announced with its cause.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import CaptureError, NotCausalError
from .match_counts import match_counts_text
from .runtime.packed_runner import PackedRunner
from .runtime.sequence_runner import RecomputeRunner, SequenceRunner, model_cache_error
from .transforms import library as _library  # noqa: F401 - registers the transforms
from .transforms.capture.attempts import Prove, StandIn, capture_proved
from .transforms.capture.export import check_causal
from .transforms.capture.length_rule import length_rule
from .transforms.capture.positions import max_positions
from .transforms.capture.rope_lengths import length_rotaries, lengths_forgotten
from .transforms.compiled import compiled
from .transforms.pipeline import PipelineReport, run_recipe
from .transforms.program import Fact, Program
from .transforms.recipe import Recipe, Step
from .transforms.verify import Reference, SequenceCheck, reference_logits
from .transforms.verify.twin import stand_in, twin_of

_log = logging.getLogger("autodeploy")

TWIN_FROM_PARAMETERS = 200_000_000

RUNGS = {
    1: "packed and cached",
    2: "one sequence at a time, with the model's own cache",
    3: "recomputed from the first token at every step",
}


@dataclass
class Built:
    """A model made ready to run, and what was done to it."""

    runner: Any
    rung: int
    cause: str = ""
    """Why it is below rung 1."""
    report: PipelineReport | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time by phase."""
    program: Program | None = None
    """What was compiled, on rung 1."""

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - started


def build_runner(
    model: nn.Module,
    recipe: Recipe,
    *,
    owned: bool = False,
    verify: bool = False,
    dump_graphs: Path | None = None,
) -> Built:
    """The highest rung of the ladder on which `model` is exact.

    Raises:
        UnsupportedModelError: on none.
        VerificationError: `verify` is on and a step of the recipe changed the logits.
    """
    built = Built(None, 1)
    check_causal(model)
    try:
        with built.timed("reference"):
            reference = reference_logits(model)
    except NotCausalError as error:
        if not generates_from_ids(model):
            raise
        # What `generate` without a cache gives: each token from a forward over all before it.
        return _lowest_rung(model, built, str(error))
    try:
        with built.timed("capture"):
            check = SequenceCheck(reference)
            program = capture_proved(
                model, check.prove, owned=owned, stand_in=_stand_in_of(model, reference)
            )
    except CaptureError as error:
        return _lower_rung(model, built, str(error), reference)
    if verify and _wants_twin(model):
        with built.timed("verify"):
            verify_on_twin(model, recipe)
        verify = False
    try:
        with built.timed("transforms"):
            cached = None if verify else _cached_check(model, program, recipe, reference)
            built.report = run_recipe(
                program, recipe, check=check if verify else cached, dump_graphs=dump_graphs
            )
    except (_CachesFail, CaptureError) as error:
        return _lower_rung(model, built, str(error), reference)
    with built.timed("compile"):
        function = compiled(program)
    built.program = program
    built.runner = PackedRunner(function, function.contract, program.weight_bytes())
    _log.info(
        "deployed packed and cached in %.1f s\n%s",
        sum(built.seconds.values()),
        built.report.table(),
    )
    return built


class _CachesFail(Exception):
    """Parts that run as they are do not go on from what they kept."""


@dataclass(frozen=True)
class _CachedCheck:
    """Checks a program once, when it has got its caches: capture proved it without."""

    check: SequenceCheck

    def __call__(self, program: Program, step: Step) -> None:
        if Fact.CACHED not in program.facts or Fact.LOWERED in program.facts:
            return
        if program.contract.hidden is not None:
            return  # checked before its head was cut off
        error = self.check.error(program)
        if not error <= self.check.reference.limit(program.contract.dtype):
            names = sorted({call.name.rsplit(".", 1)[-1] for call in program.module_calls})
            raise _CachesFail(
                f"{', '.join(names)} as the model's own code give other logits, by {error:.1e} of "
                "their range, when a sequence comes in several steps"
            )


def _stand_in_of(model: nn.Module, reference: Reference) -> StandIn | None:
    """What is proved instead of a model that amplifies rounding; None for the usual one."""
    if reference.tells:
        return None
    _log.warning(
        "%s amplifies rounding: its logits move by %.0f%% of their range if every operation in %s "
        "rounds anew. No comparison in it can tell a mistake; what fails one is proved on a small "
        "float32 model of the class instead",
        type(model).__name__, 100 * reference.noise, next(model.parameters()).dtype,
    )  # fmt: skip

    def make() -> tuple[nn.Module, Prove]:
        exact = stand_in(model)
        return exact, SequenceCheck(reference_logits(exact)).prove

    return make


def _cached_check(
    model: nn.Module, program: Program, recipe: Recipe, reference: Reference
) -> _CachedCheck | None:
    """For parts that run as they are: do they go on from what they kept? None: there are none.

    Raises:
        _CachesFail, CaptureError: those of a stand-in, which is asked where `model` can give no
            answer, do not.
    """
    if not program.module_calls:
        return None
    if reference.tells:
        return _CachedCheck(SequenceCheck(reference))
    exact = stand_in(model)
    check = SequenceCheck(reference_logits(exact))
    run_recipe(capture_proved(exact, check.prove), recipe, check=_CachedCheck(check))
    return None


def _wants_twin(model: nn.Module) -> bool:
    """Whether checking on the model itself would be slow, or blunt because of its dtype."""
    exact = all(p.dtype is torch.float32 for p in model.parameters() if p.is_floating_point())
    return not exact or sum(p.numel() for p in model.parameters()) > TWIN_FROM_PARAMETERS


def verify_on_twin(model: nn.Module, recipe: Recipe) -> None:
    """Runs the recipe on a small float32 model of the same class, checking after every step.

    Raises:
        VerificationError: a step changed the logits, or no twin can be made.
    """
    twin = twin_of(model)
    check = SequenceCheck(reference_logits(twin))
    program = capture_proved(twin, check.prove)
    run_recipe(program, recipe, check=check)
    _log.info("verified every step of %s on a twin of %s", recipe.name, type(model).__name__)


def _lower_rung(model: nn.Module, built: Built, cause: str, reference: Reference) -> Built:
    """The model itself, called by a runner: slower, exact, and announced."""
    built.cause = cause
    rotaries = length_rotaries(model)
    fresh = partial(lengths_forgotten, rotaries)
    why_not_2 = ""
    try:
        rule = length_rule(model, rotaries)
        why_not_2 = _own_cache_fails(model, reference)
    except CaptureError as unknown:
        why_not_2 = str(unknown)
    if why_not_2:
        built.rung = 3
        built.runner = RecomputeRunner(model, max_positions(model), fresh)
        why_not_2 = f"; its own cache cannot be used either: {why_not_2}"
    else:
        built.rung = 2
        built.runner = SequenceRunner(model, max_positions(model), fresh, rule)
    _log.warning(
        "%s runs on rung %d of 3 (%s), which is slow, because: %s%s",
        type(model).__name__, built.rung, RUNGS[built.rung], cause, why_not_2,
    )  # fmt: skip
    return built


def _own_cache_fails(model: nn.Module, reference: Reference) -> str:
    """Why decoding with the model's own cache is not right; empty: it is."""
    error = model_cache_error(model, partial(lengths_forgotten, length_rotaries(model)))
    limit = reference.limit(next(model.parameters()).dtype)
    if error is None:
        return "it keeps none"
    if error <= limit:
        return ""
    if not reference.tells:
        exact = stand_in(model)
        return _own_cache_fails(exact, reference_logits(exact))
    return f"decode differs from prefill by {error:.1e}"


def generates_from_ids(model: nn.Module) -> bool:
    """Whether generation feeds the model its tokens so far, and nothing else.

    A model of which a config has to say that it is a decoder is meant to be causal as one.
    """
    config: Any = model.config
    if getattr(config, "is_decoder", None) is not None:
        return False
    ids = torch.arange(8, 13, device=next(model.parameters()).device)[None]
    prepare: Any = model.prepare_inputs_for_generation
    prepared = prepare(ids, attention_mask=torch.ones_like(ids))
    given = prepared.pop("input_ids", None)
    others = {name for name, value in prepared.items() if isinstance(value, torch.Tensor)}
    return (
        isinstance(given, torch.Tensor)
        and torch.equal(given, ids)
        and others <= {"attention_mask", "position_ids"}
    )


def _lowest_rung(model: nn.Module, built: Built, cause: str) -> Built:
    built.rung, built.cause = 3, cause
    fresh = partial(lengths_forgotten, length_rotaries(model))
    built.runner = RecomputeRunner(model, max_positions(model), fresh)
    _log.warning(
        "%s runs on rung 3 of 3 (%s), which is slow, because: %s",
        type(model).__name__, RUNGS[3], cause,
    )  # fmt: skip
    return built


def summary(built: Built) -> dict[str, str]:
    """What was built, as text for logs, `EngineReady` and the command line."""
    facts = {"rung": f"{built.rung} ({RUNGS[built.rung]})"}
    if built.cause:
        facts["cause"] = built.cause
    if built.report is not None:
        facts["recipe"] = built.report.recipe
        facts["transforms"] = match_counts_text({s.id: s.matches for s in built.report.steps})
    facts.update({f"{phase} seconds": f"{s:.2f}" for phase, s in built.seconds.items()})
    return facts
