"""Rounding: whether a model deployed in bfloat16 is as near to float32 as the plain one is.

Tokens cannot be compared there: two correct programs round differently. The plain model in
bfloat16 differs from itself in float32, with the same weights, by some error; ours may differ from
either by as much: the logits of its program here, and what an engine serves in `served_rounding`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from autodeploy.ladder import build_runner
from autodeploy.transforms.recipe import load_recipe
from autodeploy.transforms.verify import SequenceCheck, reference_logits

from .measure import one_line, quiet, tiny_model
from .served_rounding import SLACK, ServedRounding, serve_rounded

Models = tuple[nn.Module, nn.Module]
"""One model in low precision and, with the same weights, in float32."""


@dataclass
class Rounding:
    """Errors of logits over their range, and how it serves."""

    name: str
    rung: int = 0
    plain: float = float("nan")
    """The plain model in the low precision, from itself in float32."""
    ours: float = float("nan")
    """The deployed model's program from the plain one in float32; rung 1."""
    between: float = float("nan")
    """The deployed model's program from the plain one in the low precision; rung 1."""
    served: ServedRounding | None = None
    cause: str = ""
    """Why it is below rung 1, or was refused, or failed."""
    seconds: float = 0.0

    @property
    def agrees(self) -> bool:
        """Whether ours is as near to one of them as they are to each other, and serves so."""
        near = self.rung > 1 or min(self.ours, self.between) <= SLACK * self.plain
        return near and self.served is not None and self.served.agrees


@dataclass(frozen=True)
class MeasureRounding:
    """Measures tiny models of architectures by their names; never raises."""

    device: str
    dtype: torch.dtype = torch.bfloat16

    def __call__(self, name: str) -> Rounding:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        quiet()
        return measure_rounding(name, lambda: self._models(tiny_model(CONFIG_MAPPING[name]())))

    def failure(self, name: str, cause: str, seconds: float) -> Rounding:
        """What is known of one whose process came to nothing."""
        return Rounding(name, cause=cause, seconds=seconds)

    def _models(self, exact: nn.Module) -> Models:
        low: nn.Module = AutoModelForCausalLM.from_config(
            exact.config, dtype=self.dtype, trust_remote_code=True
        ).eval()
        # As from a checkpoint: buffers that are in none keep their precision.
        low.load_state_dict(exact.state_dict())
        exact.load_state_dict(low.state_dict())
        return low.to(self.device), exact.to(self.device)


def measure_rounding(name: str, make: Callable[[], Models]) -> Rounding:
    """Deploys a model in low precision, where it is, and compares; never raises."""
    result = Rounding(name)
    started = time.perf_counter()
    try:
        _measure(result, *make())
    except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to this model's row
        result.cause = one_line(error)
    result.seconds = round(time.perf_counter() - started, 1)
    return result


def _measure(result: Rounding, low: nn.Module, exact: nn.Module) -> None:
    built = build_runner(low, load_recipe("default"))
    result.rung, result.cause = built.rung, built.cause
    plain, full = reference_logits(low), reference_logits(exact)
    scale = max(float(b.abs().max()) for b in full.logits)
    result.plain = _difference(plain.logits, full.logits, scale)
    if built.program is not None:
        found = SequenceCheck(full).logits(built.program)
        result.ours = _difference(found, full.logits, scale)
        result.between = _difference(found, plain.logits, scale)
    result.served = serve_rounded(low, exact, built.runner, plain.implementation)


def _difference(
    found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], scale: float
) -> float:
    """Over the better two thirds of the positions, as `SequenceCheck.error` is in bfloat16."""
    pairs = zip(found, wanted, strict=True)
    errors = torch.cat([(a.float() - b.float()).abs().amax(-1) / scale for a, b in pairs])
    return float(errors.quantile(2 / 3))


def table(results: Sequence[Rounding]) -> str:
    """One line each: errors of logits, then of what was served, then how it was served."""
    lines = [
        f"{'':24}      logits of the program       | served",
        f"{'architecture':24} rung plain/32 ours/32 ours/pl | tokens beyond   noise     gap logprob"
        " preempt   hits replays eager     s",
    ]
    lines += [row(r) for r in results]
    agreeing = sum(r.agrees for r in results)
    return "\n".join([*lines, f"{agreeing} of {len(results)} agree"])


def row(r: Rounding) -> str:
    """Its line of the table."""
    line = f"{r.name[-24:]:24} {r.rung:4} {r.plain:8.1e} {r.ours:7.1e} {r.between:7.1e} |"
    s = r.served
    if s is not None:
        line += (
            f" {s.tokens:6} {s.beyond:6} {s.noise:7.1e} {s.gap:7.1e} {s.logprob_error:7.1e}"
            f" {s.preemptions:7} {s.prefix_hits:6} {s.replays:7} {s.without_graph:5}"
            f" {r.seconds:5.1f}"
        )
    line += "" if r.agrees else "  NOT AS NEAR"
    return line + (f"  {r.cause[:120]}" if r.cause else "")
