"""Whether all but the ops that mix tokens works on each token by itself.

Caches stand in for earlier tokens in those ops only. So what they return is recorded for whole
sequences and handed to a run of the last tokens alone: if that run gives other logits, something
else looks at the other tokens, or at how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from autodeploy.custom_ops.op import op_of

from ..program import Interpreter, Program

_LAST = 3


@torch.no_grad()
def row_error(program: Program, inputs: Mapping[str, torch.Tensor]) -> float:
    """Largest difference of logits over their largest magnitude; of the better rows, in bfloat16.

    inputs: those of packed whole sequences longer than 3 tokens, with all logits asked for.
    """
    bounds = inputs["cu_q"].tolist()
    rows = torch.cat([torch.arange(end - _LAST, end) for end in bounds[1:]])
    rows = rows.to(inputs["input_ids"].device)
    whole = _Whole(program)
    expected = whole.run(*[inputs[name] for name in program.inputs()]).index_select(0, rows)
    last = {
        "input_ids": inputs["input_ids"][:, rows],
        "position_ids": inputs["position_ids"][:, rows],
        "cu_q": torch.arange(0, len(rows) + 1, _LAST).to(inputs["cu_q"]),
        "logit_index": torch.arange(len(rows), device=rows.device),
    }
    if "known_len" in inputs:
        last["known_len"] = inputs["known_len"][:, rows]
    found = _Last(program, whole.mixed, rows).run(*[last[name] for name in program.inputs()])
    differences = (found.float() - expected.float()).abs().amax(-1)
    exact = program.contract.dtype in (torch.float32, torch.float64)
    # Few and many rows go through different kernels: in low precision a choice among experts may
    # fall the other way, as in `SequenceCheck.error`.
    difference = differences.max() if exact else differences.quantile(2 / 3)
    return float(difference / expected.abs().max().clamp_min(1e-9))


def _mixes(node: fx.Node) -> bool:
    op = op_of(node.target)
    return op is not None and op.cached is not None


class _Whole(Interpreter):
    """Keeps what the ops that mix tokens return."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.mixed: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if _mixes(n):
            self.mixed[n] = result
        return result


class _Last(Interpreter):
    """Has those ops return what was kept, for some rows."""

    def __init__(self, program: Program, mixed: Mapping[fx.Node, Any], rows: torch.Tensor) -> None:
        super().__init__(program)
        self._mixed = mixed
        self._rows = rows
        self._tokens = program.inputs()["input_ids"].meta["val"].shape[1].node.expr

    def run_node(self, n: fx.Node) -> Any:
        if n in self._mixed:
            return tree_map(self._select, n.meta["val"], self._mixed[n])
        return super().run_node(n)

    def _select(self, shape: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        for axis, extent in enumerate(shape.shape):
            if isinstance(extent, torch.SymInt) and extent.node.expr == self._tokens:
                value = value.index_select(axis, self._rows)
        return value
