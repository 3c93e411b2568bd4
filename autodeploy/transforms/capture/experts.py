"""Every layer of routed experts becomes one `autodeploy::experts` node.

What the gate computes is proved, not read off names: the module's own gate function runs on
random numbers and is compared with each gate our op can express.
"""

from __future__ import annotations

import logging
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from autodeploy.custom_ops.moe import ACTIVATIONS, experts, gate

from .attention import configs_of
from .interception import Interception

IMPLEMENTATION = "autodeploy"
_log = logging.getLogger(__name__)


def intercept_experts(scope: Interception, model: nn.Module) -> None:
    """Routes the experts layers of `model` to our op while `scope` is open."""
    scope.set_item(ALL_EXPERTS_FUNCTIONS._global_mapping, IMPLEMENTATION, _run_experts)
    for config in configs_of(model):
        scope.set_attribute(config, "_experts_implementation_internal", IMPLEMENTATION)


def _run_experts(
    module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """hidden [T, H], top_k_index and top_k_weights [T, k] -> [T, H]."""
    gating = prove_gate(module)
    if gating is None or getattr(module, "has_post_expert_norm", False):
        _log.warning(
            "%s: its gate is none the experts op expresses; experts run as batched products, "
            "which reads every routed expert once per token",
            type(module).__name__,
        )
        return ALL_EXPERTS_FUNCTIONS["batched_mm"](module, hidden, top_k_index, top_k_weights)
    up = "gate_up_proj" if module.has_gate else "up_proj"
    return experts(
        hidden,
        top_k_index,
        top_k_weights,
        getattr(module, up),
        module.down_proj,
        getattr(module, f"{up}_bias") if module.has_bias else None,
        module.down_proj_bias if module.has_bias else None,
        gated=bool(module.has_gate),
        transposed=bool(module.is_transposed),
        **gating,
    )


def prove_gate(module: Any) -> dict[str, Any] | None:
    """Arguments of the experts op that reproduce the module's gate; None if none do."""
    with _disable_current_modes():
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(64, 32, generator=generator) * 4
        if not module.has_gate:
            expected = module.act_fn(sample)
            for name, function in ACTIVATIONS.items():
                if torch.allclose(function(sample), expected, rtol=1e-5, atol=1e-6):
                    return {"activation": name}
            return None
        expected = module._apply_gate(sample)
        numbers = [
            0.0,
            *sorted({float(v) for v in vars(module).values() if type(v) in (int, float)}),
        ]
        plain = product(ACTIVATIONS, (False, True), (0.0,), (0.0,))
        clamped = product(("silu",), (True, False), numbers, numbers)
        for name, interleaved, limit, alpha in (*plain, *clamped):
            found = gate(sample, name, interleaved, limit, alpha)
            if found.shape == expected.shape and torch.allclose(
                found, expected, rtol=1e-5, atol=1e-6
            ):
                return {
                    "activation": name, "interleaved": interleaved, "limit": limit, "alpha": alpha
                }  # fmt: skip
    return None
