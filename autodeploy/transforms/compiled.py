"""CompiledProgram: what a finished pipeline leaves: a function of step inputs and caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autodeploy.custom_ops.contract import Contract

from .program import Program


@dataclass(frozen=True)
class CompiledProgram:
    """Runs a lowered and loaded program. `inputs`: names in the graph's order."""

    function: Callable[..., Any]
    inputs: tuple[str, ...]
    contract: Contract
    module_calls: tuple[Any, ...] = ()
    """Kept alive for the nodes that call them by name."""

    def __call__(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Step inputs and caches by name -> logits [N, vocab]."""
        result: torch.Tensor = self.function(*[values[name] for name in self.inputs])
        return result


def compiled(program: Program) -> CompiledProgram:
    """The callable of a program that has been through its recipe."""
    program.graph_module.recompile()
    function = program.function or program.graph_module.forward
    return CompiledProgram(
        function, tuple(program.inputs()), program.contract, tuple(program.module_calls)
    )
