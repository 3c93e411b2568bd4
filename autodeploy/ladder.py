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
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import CaptureError
from .runtime.packed_runner import PackedRunner
from .runtime.sequence_runner import RecomputeRunner, SequenceRunner, model_cache_error
from .transforms import library as _library  # noqa: F401 - registers the transforms
from .transforms.capture.export import capture, check_causal, max_positions
from .transforms.compiled import compiled
from .transforms.pipeline import PipelineReport, run_recipe
from .transforms.program import Program
from .transforms.recipe import Recipe
from .transforms.verify import SequenceCheck, reference_logits, tolerance
from .transforms.verify.twin import twin_of

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
    reference = reference_logits(model)
    try:
        with built.timed("capture"):
            program = capture(model, owned=owned)
            check = SequenceCheck(reference)
            check.prove(program)
    except CaptureError as error:
        return _lower_rung(model, built, str(error))
    if verify and _wants_twin(model):
        with built.timed("verify"):
            verify_on_twin(model, recipe)
        verify = False
    with built.timed("transforms"):
        built.report = run_recipe(
            program, recipe, check=check if verify else None, dump_graphs=dump_graphs
        )
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
    program = capture(twin)
    check = SequenceCheck(reference_logits(twin))
    check.prove(program)
    run_recipe(program, recipe, check=check)
    _log.info("verified every step of %s on a twin of %s", recipe.name, type(model).__name__)


def _lower_rung(model: nn.Module, built: Built, cause: str) -> Built:
    """The model itself, called by a runner: slower, exact, and announced."""
    built.cause = cause
    limit = tolerance(next(model.parameters()).dtype)
    error = model_cache_error(model)
    built.rung = 2 if error is not None and error <= limit else 3
    kind = SequenceRunner if built.rung == 2 else RecomputeRunner
    built.runner = kind(model, max_positions(model))
    why_not_2 = (
        ""
        if built.rung == 2
        else (
            "; its own cache cannot be used either: "
            + ("it keeps none" if error is None else f"decode differs from prefill by {error:.1e}")
        )
    )
    _log.warning(
        "%s runs on rung %d of 3 (%s), which is slow, because: %s%s",
        type(model).__name__, built.rung, RUNGS[built.rung], cause, why_not_2,
    )  # fmt: skip
    return built


def summary(built: Built) -> dict[str, str]:
    """What was built, as text for logs, `EngineReady` and the command line."""
    facts = {"rung": f"{built.rung} ({RUNGS[built.rung]})"}
    if built.cause:
        facts["cause"] = built.cause
    if built.report is not None:
        facts["recipe"] = built.report.recipe
        facts["transforms"] = ", ".join(f"{s.id} {s.matches}" for s in built.report.steps)
    facts.update({f"{phase} seconds": f"{s:.2f}" for phase, s in built.seconds.items()})
    return facts
