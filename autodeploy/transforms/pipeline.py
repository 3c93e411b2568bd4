"""The driver: runs a recipe's steps over a program, and owns timing, counts, dumps and checks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import TransformError
from .graph_text import graph_text
from .program import Program
from .recipe import Recipe, Step

Check = Callable[[Program, Step], None]
"""Called after every step; raises VerificationError if the program changed its numbers."""


@dataclass(frozen=True)
class StepReport:
    """What one step did."""

    id: str
    transform: str
    matches: int
    skipped: int
    """Sites left alone because the gain was not positive."""
    seconds: float
    nodes: int
    note: str = ""


@dataclass
class PipelineReport:
    """What a whole recipe did to one program, step by step."""

    recipe: str
    steps: list[StepReport] = field(default_factory=list)

    def table(self) -> str:
        """The report as aligned text."""
        rows = [("step", "matches", "nodes", "seconds")]
        rows += [(s.id, str(s.matches), str(s.nodes), f"{s.seconds:.2f}") for s in self.steps]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join(
                c.ljust(w) if i == 0 else c.rjust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        notes = [f"{s.id}: {s.note}" for s in self.steps if s.note]
        return "\n".join(lines + notes)


def run_recipe(
    program: Program,
    recipe: Recipe,
    *,
    check: Check | None = None,
    dump_graphs: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> PipelineReport:
    """Runs every step of `recipe` on `program`, in place.

    check: called after every step. dump_graphs: a directory for the graph's text before the
    first and after every step. progress: called with each step's id as it starts.

    Raises:
        TransformError: a step failed, or found fewer sites than it expects.
    """
    report = PipelineReport(recipe.name)
    _dump(dump_graphs, 0, "captured", program)
    for index, step in enumerate(recipe.steps, 1):
        if progress is not None:
            progress(step.id)
        report.steps.append(run_step(program, step))
        _dump(dump_graphs, index, step.id, program)
        if check is not None:
            check(program, step)
    return report


def run_step(program: Program, step: Step) -> StepReport:
    """Runs one step: finds its sites, rewrites those that pay, cleans up, updates the facts."""
    started = time.perf_counter()
    transform = step.transform
    missing = transform.needs - program.facts
    if missing:
        names = ", ".join(sorted(fact.name for fact in missing))
        raise TransformError(f"step '{step.id}' needs {names}, which the program does not have")
    matches = skipped = 0
    for site in list(transform.sites(program)):
        gain = transform.gain(program, site)
        if gain is not None and gain.is_number and gain <= 0:
            skipped += 1
            continue
        try:
            transform.rewrite(program, site)
        except TransformError:
            raise
        except Exception as error:
            raise TransformError(
                f"step '{step.id}' failed at {site.where}: {type(error).__name__}: {error}"
            ) from error
        matches += 1
    if matches + skipped < step.expect:
        raise TransformError(
            f"step '{step.id}' expects {step.expect} sites and found {matches + skipped}; "
            "set 'expect: 0' if this model has none"
        )
    note = transform.finish(program)
    program.remove_unused()
    program.facts |= transform.gives
    program.facts -= transform.breaks
    return StepReport(
        step.id,
        transform.name,
        matches,
        skipped,
        time.perf_counter() - started,
        len(program.graph.nodes),
        note or "",
    )


def _dump(folder: Path | None, index: int, name: str, program: Program) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{index:02d}_{name}.txt").write_text(graph_text(program))
