"""How far two right implementations of a model may lie apart, because they round differently.

In bfloat16 a deep model's logits move by several percent of their range when its operations are
done in another order. How much depends on its depth and weights, so it is measured: the plain
model runs once more with the output of every leaf module off by about one rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

MOST = 0.15
"""Of the logits' range: noise beyond it hides what a check is to find, and is not accepted."""


@contextmanager
def rounding_noise(model: nn.Module, seed: int = 1) -> Iterator[None]:
    """Inside, floating-point outputs of leaf modules are multiplied by 1 + eps / 2 * N(0, 1)."""
    generators: dict[torch.device, torch.Generator] = {}

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return output
        if output.device not in generators:
            generators[output.device] = torch.Generator(output.device).manual_seed(seed)
        noise = torch.randn(output.shape, generator=generators[output.device], device=output.device)
        scale = torch.finfo(output.dtype).eps / 2
        return (output.float() * (1 + scale * noise)).to(output.dtype)

    leaves = [m for m in model.modules() if not any(True for _ in m.children())]
    handles = [leaf.register_forward_hook(hook) for leaf in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
