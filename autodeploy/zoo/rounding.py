"""Rounding: whether a model deployed in bfloat16 is as near to float32 as the plain one is.

Tokens cannot be compared there: two correct programs round differently. The plain model in
bfloat16 differs from itself in float32 by some error; ours may differ from either by as much.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from autodeploy.ladder import build_runner
from autodeploy.transforms.recipe import load_recipe
from autodeploy.transforms.verify import SequenceCheck, reference_logits

from .measure import one_line, tiny_model

# Rounding is noise: its largest error over a few thousand logits varies by this much.
_SLACK = 1.5


@dataclass
class Rounding:
    """Errors of logits over their range."""

    name: str
    rung: int = 0
    plain: float = float("nan")
    """The plain model in the low precision, from itself in float32."""
    ours: float = float("nan")
    """The deployed model from the plain one in float32."""
    between: float = float("nan")
    """The deployed model from the plain one in the low precision."""
    cause: str = ""

    @property
    def agrees(self) -> bool:
        """Whether ours is as near to one of them as they are to each other."""
        return min(self.ours, self.between) <= _SLACK * self.plain


def measure_rounding(
    name: str, config: Callable[[], PretrainedConfig], device: str, dtype: torch.dtype
) -> Rounding:
    """Deploys a tiny model in `dtype` on `device` and compares; never raises."""
    result = Rounding(name)
    try:
        exact = tiny_model(config()).to(device)
        model = copy.deepcopy(exact).to(dtype)
        built = build_runner(model, load_recipe("default"))
        result.rung, result.cause = built.rung, built.cause
        plain = reference_logits(model)
        full = reference_logits(exact)
        scale = max(float(b.abs().max()) for b in full.logits)
        result.plain = _difference(plain.logits, full.logits, scale)
        if built.program is not None:
            found = SequenceCheck(full).logits(built.program)
            result.ours = _difference(found, full.logits, scale)
            result.between = _difference(found, plain.logits, scale)
    except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to this model's row
        result.cause = one_line(error)
    return result


def _difference(
    found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], scale: float
) -> float:
    """Over the better two thirds of the positions, as `SequenceCheck.error` is in bfloat16."""
    pairs = zip(found, wanted, strict=True)
    errors = torch.cat([(a.float() - b.float()).abs().amax(-1) / scale for a, b in pairs])
    return float(errors.quantile(2 / 3))


def table(results: list[Rounding]) -> str:
    """One line each."""
    lines = [f"{'architecture':24} rung  plain/fp32  ours/fp32  ours/plain"]
    for r in results:
        verdict = "" if r.agrees else "  NOT AS NEAR"
        lines.append(
            f"{r.name:24} {r.rung:4}  {r.plain:10.1e} {r.ours:10.1e}  {r.between:10.1e}{verdict}"
            + (f"  {r.cause[:120]}" if r.cause else "")
        )
    agreeing = sum(r.agrees for r in results)
    return "\n".join([*lines, f"{agreeing} of {len(results)} agree"])
