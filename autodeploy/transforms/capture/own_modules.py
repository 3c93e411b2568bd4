"""Parts of a model that are captured as they are: one node that calls their own code.

While a model is traced, the forward of such a part hands its tensors to a node of
`custom_ops/module` and gives back tensors of the recorded form, so that the trace goes on behind
it and never looks inside.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autodeploy.custom_ops.module import (
    CALLS,
    recurrent_module,
    sequence_module,
    token_module,
)

from ...errors import CaptureError
from .attention import MaskArgument
from .boundaries import current_cu_q
from .interception import Interception
from .masks import Mask
from .module_calls import ModuleCall
from .module_form import ModuleForm
from .object_state import Path, leaves, rebuilt

_serial = itertools.count()


@dataclass(frozen=True)
class OwnModule:
    """A part to capture as it is, and the form of each of its calls in one forward."""

    path: str
    mixes: bool
    forms: tuple[ModuleForm, ...]


def intercept_own_modules(
    scope: Interception, model: nn.Module, own: Mapping[str, OwnModule]
) -> list[ModuleCall]:
    """Makes nodes of the parts in `own` while `scope` is open.

    Returns the calls behind the nodes, filled while tracing; whoever runs the graph holds them.
    """
    calls: list[ModuleCall] = []
    for path, module in own.items():
        part = model.get_submodule(path)
        scope.set_attribute(part, "forward", _forward(part, module, calls))
    return calls


def _forward(part: nn.Module, module: OwnModule, calls: list[ModuleCall]) -> Any:
    # Not of `part.forward`: another hook may have taken its place.
    signature = module.forms[0].alone.arguments.signature
    counter = itertools.count()

    def forward(*args: Any, **kwargs: Any) -> Any:
        # Each call has its own place in the forward, and its own past.
        form = module.forms[next(counter) % len(module.forms)]
        given = leaves(signature.bind(*args, **kwargs).arguments, also=(MaskArgument,))
        call = ModuleCall(part, form, _proved_masks(form, given))
        inputs = [_input(form, rows, given) for rows in form.inputs]
        key = f"{form.path}#{next(_serial)}"
        calls.append(call)
        CALLS[key] = call
        if not module.mixes:
            outputs = token_module(inputs, key)
        else:
            op = sequence_module if call.token_caches else recurrent_module
            outputs = op(inputs, current_cu_q(), key)
        # Attention weights and the like: nobody may look at what has no row per token.
        template = leaves({"out": form.output_template})
        values: dict[Path, Any] = {
            path: None for path, value in template.items() if isinstance(value, torch.Tensor)
        }
        values |= {
            rows.path: rows.back(value) for rows, value in zip(form.outputs, outputs, strict=True)
        }
        return rebuilt(form.output_template, (("item", "out"),), values)

    return forward


def _input(form: ModuleForm, rows: Any, given: Mapping[Path, Any]) -> torch.Tensor:
    value = given.get(rows.path)
    if not isinstance(value, torch.Tensor) or value.dim() != len(rows.shape) + 1:
        raise CaptureError(f"{form.path} is called with other arguments than when it was recorded")
    return rows.first(value)


def _proved_masks(form: ModuleForm, given: Mapping[Path, Any]) -> dict[Path, Mask]:
    """Every mask the part takes, as what it was shown to be."""
    masks = {}
    for path, value in given.items():
        if isinstance(value, MaskArgument):
            if value.proved is None:
                raise CaptureError(f"{form.path} takes a mask that is none of the known kinds")
            masks[path] = value.proved
    missing = [path for path in form.masks if path not in masks]
    if missing:
        name = ".".join(str(step) for _, step in missing[0])
        raise CaptureError(f"{form.path} takes a mask '{name}' that was not made by transformers")
    return masks
