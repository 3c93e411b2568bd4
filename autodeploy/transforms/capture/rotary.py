"""Rotary embeddings become one `autodeploy::rope` node per layer.

Models apply them through a module-level function named `apply_rotary_pos_emb`. It is run on
random numbers and replaced only where our op gives the same; a call with arguments the op does
not know runs the model's own function, which is exact, only not fused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from autodeploy.custom_ops.rope import rope

from .interception import Interception, modeling_modules

_NAME = "apply_rotary_pos_emb"


def intercept_rotary(scope: Interception, model: nn.Module) -> None:
    """Replaces the rotary function of the model's modules while `scope` is open."""
    for module in modeling_modules(model):
        original = vars(module).get(_NAME)
        if not callable(original) or tuple(inspect.signature(original).parameters)[:4] != (
            "q", "k", "cos", "sin",
        ):  # fmt: skip
            continue
        interleaved = prove_rope(original)
        if interleaved is not None:
            replacement = _replacement(original, interleaved, returns_dtype_of_heads(original))
            scope.set_attribute(module, _NAME, replacement)
    _follow_bound_copies(scope, model)


def _follow_bound_copies(scope: Interception, model: nn.Module) -> None:
    """Attention classes may hold the function itself, bound when the class was decorated."""
    for part in model.modules():
        bound = vars(part).get("rotary_fn")
        home = inspect.getmodule(type(part))
        if bound is not None and home is not None and hasattr(home, _NAME):
            scope.set_attribute(part, "rotary_fn", getattr(home, _NAME))


def _replacement(
    original: Callable[..., Any], interleaved: bool, casts: bool
) -> Callable[..., Any]:
    def apply(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        unsqueeze_dim = kwargs.get("unsqueeze_dim", 1)
        known = set(kwargs) <= {"unsqueeze_dim"} and not args
        if known and cos.dim() == 3 and q.dim() == 4 and k is not None and unsqueeze_dim in (1, 2):
            turned = rope(q, k, cos, sin, interleaved, unsqueeze_dim)
            if casts and cos.dtype is not q.dtype:
                return turned[0].to(q.dtype), turned[1].to(k.dtype)
            return turned
        return original(q, k, cos, sin, *args, **kwargs)

    return apply


def prove_rope(function: Callable[..., Any]) -> bool | None:
    """Whether `function(q, k, cos, sin)` is the interleaved form; None if it is neither form."""
    with _disable_current_modes(), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(1, 4, 5, 16, generator=generator)
        k = torch.randn(1, 2, 5, 16, generator=generator)
        matching = {True, False}
        for width in (16, 8):
            cos = torch.randn(1, 5, width, generator=generator)
            sin = torch.randn(1, 5, width, generator=generator)
            try:
                expected = function(q, k, cos, sin)
            except (TypeError, RuntimeError, ValueError, AttributeError):
                # Forms that rotate the whole head refuse a narrower table: no proof against.
                if width == 16:
                    return None
                continue
            matching = {form for form in matching if _same(rope(q, k, cos, sin, form), expected)}
    return matching.pop() if len(matching) == 1 else None


def returns_dtype_of_heads(function: Callable[..., Any]) -> bool:
    """Whether heads turned by a table of a wider dtype come back in their own."""
    with _disable_current_modes(), torch.no_grad():
        heads, table = torch.ones(1, 2, 3, 16, dtype=torch.bfloat16), torch.ones(1, 3, 16)
        turned = function(heads, heads, table, table)
    return bool(turned[0].dtype is heads.dtype)


def _same(found: tuple[torch.Tensor, ...], expected: Any) -> bool:
    return len(expected) == len(found) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        for a, b in zip(found, expected, strict=True)
    )
