"""RMS norms become one `autodeploy::rms_norm` node each, found by what they compute.

A leaf module with at most one vector of weights is run on random numbers with random weights,
in float32 and bfloat16, and replaced only if the op gives the same result.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from autodeploy.custom_ops.norm import rms_norm

from .interception import Interception


def intercept_norms(scope: Interception, model: nn.Module) -> None:
    """Replaces the forward of every module shown to be an RMS norm while `scope` is open."""
    proved: dict[Any, dict[str, Any] | None] = {}
    for module in model.modules():
        key = _probe_key(module)
        if key is None:
            continue
        if key not in proved:
            proved[key] = prove_rms_norm(module)
        form = proved[key]
        if form is not None:
            scope.set_attribute(module, "forward", _forward(module, form))


def _forward(module: nn.Module, form: dict[str, Any]) -> Any:
    original = module.forward

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if any(value is not None for value in (*args, *kwargs.values())):
            # A gate or residual: more than what was proved.
            return original(hidden_states, *args, **kwargs)
        return rms_norm(hidden_states, getattr(module, "weight", None), **form)

    return forward


def _floats(module: nn.Module) -> dict[str, float]:
    return {name: v for name, v in vars(module).items() if type(v) is float}


def _probe_key(module: nn.Module) -> Any:
    """What decides the result of a candidate, or None if the module cannot be an RMS norm."""
    parameters = dict(module.named_parameters(recurse=False))
    if module._modules or module._buffers or "forward" in vars(module):
        return None
    if set(parameters) - {"weight"} or any(p.dim() != 1 for p in parameters.values()):
        return None
    epsilons = sorted(_floats(module).items())
    if not any(0.0 < value < 1e-2 for _, value in epsilons):
        return None
    required = [
        p for p in inspect.signature(module.forward).parameters.values()
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD
    ]  # fmt: skip
    if len(required) != 1:
        return None
    width = parameters["weight"].shape[0] if parameters else 0
    flags = sorted(
        (k, v) for k, v in vars(module).items() if isinstance(v, bool) and k != "training"
    )
    return type(module), width, tuple(epsilons), tuple(flags)


def prove_rms_norm(module: nn.Module) -> dict[str, Any] | None:
    """Keyword arguments of `rms_norm` that reproduce the module exactly; None if none do."""
    with _disable_current_modes(), torch.no_grad():
        own = module._parameters.get("weight")
        width = 32 if own is None else int(own.shape[0])
        generator = torch.Generator().manual_seed(0)
        weight = torch.rand(width, generator=generator) + 0.25
        x = torch.randn(7, width, generator=generator) * 3
        epsilons = {value for value in _floats(module).values() if 0.0 < value < 1e-2}
        forms = [
            {"eps": eps, "offset": offset, "cast_before_weight": cast}
            for eps in sorted(epsilons)
            for offset in (0.0, 1.0)
            for cast in (True, False)
        ]
        for form in forms:
            if all(
                _same(module, form, x.to(d), weight.to(d)) for d in (torch.float32, torch.bfloat16)
            ):
                return form
    return None


def _same(module: nn.Module, form: dict[str, Any], x: torch.Tensor, weight: torch.Tensor) -> bool:
    twin = copy.copy(module)
    twin._parameters = {name: nn.Parameter(weight) for name in module._parameters}
    try:
        expected = twin.forward(x)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False  # not a function of one tensor: no norm
    found = rms_norm(x, weight if module._parameters else None, **form)
    if not isinstance(expected, torch.Tensor) or expected.shape != found.shape:
        return False
    if x.dtype is torch.bfloat16:
        # Two roundings of bfloat16 tell a cast before the weight from one after it.
        return expected.dtype == found.dtype and bool((expected == found).float().mean() > 0.999)
    return torch.allclose(expected, found, rtol=1e-5, atol=1e-6)
