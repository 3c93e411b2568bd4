"""Rotary embeddings become one `autodeploy::rope` node per layer.

Models apply them through module-level functions whose names begin with `apply_rotary`, of heads
and either cosines and sines or both as one complex number. Such a function is run on random
numbers and replaced only where our op gives the same, in one of the forms it is known in; a call
with arguments the op does not know runs the model's own function, which is exact, only not fused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from autodeploy.custom_ops.rope import rope

from .interception import Interception, modeling_modules

_PREFIX = "apply_rotary"
_NAME = "apply_rotary_pos_emb"
_TABLE = ("q", "k", "cos", "sin")
_COMPLEX = ("xq", "xk", "freqs_cis")


@dataclass(frozen=True)
class Form:
    """How a function that turns heads differs from op `rope`."""

    interleaved: bool
    apart: bool = False
    """Interleaved pairs come back as in the other form, first numbers before second numbers."""
    once: bool = False
    """The table has one column for each pair; the op's has each column twice."""


_PLAIN = (Form(False), Form(True))
"""The op's own forms: others are proved, and so replaced, only where whole heads are turned."""
_FORMS = (*_PLAIN, Form(True, apart=True), Form(False, once=True), Form(True, once=True))


def intercept_rotary(scope: Interception, model: nn.Module) -> None:
    """Replaces the rotary functions of the model's modules while `scope` is open."""
    for module in modeling_modules(model):
        for name, original in list(_functions(module)):
            parameters = tuple(inspect.signature(original).parameters)
            if parameters[:4] == _TABLE:
                form = prove_rope(original)
                if form is not None:
                    casts = returns_dtype_of_heads(original, 8 if form.once else 16)
                    scope.set_attribute(module, name, _replacement(original, form, casts))
            elif parameters == _COMPLEX:
                dimension = prove_complex(original)
                if dimension is not None:
                    scope.set_attribute(module, name, _complex_replacement(original, dimension))
    _follow_bound_copies(scope, model)


def _functions(module: ModuleType) -> Iterator[tuple[str, Callable[..., Any]]]:
    for name, value in vars(module).items():
        if name.startswith(_PREFIX) and callable(value):
            yield name, value


def _follow_bound_copies(scope: Interception, model: nn.Module) -> None:
    """Attention classes may hold the function itself, bound when the class was decorated."""
    for part in model.modules():
        bound = vars(part).get("rotary_fn")
        home = inspect.getmodule(type(part))
        if bound is not None and home is not None and hasattr(home, _NAME):
            scope.set_attribute(part, "rotary_fn", getattr(home, _NAME))


def _replacement(original: Callable[..., Any], form: Form, casts: bool) -> Callable[..., Any]:
    def apply(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        unsqueeze_dim = kwargs.get("unsqueeze_dim", 1)
        known = set(kwargs) <= {"unsqueeze_dim"} and not args
        if known and cos.dim() == 3 and q.dim() == 4 and k is not None and unsqueeze_dim in (1, 2):
            width = cos.shape[-1] * (2 if form.once else 1)
            if form in _PLAIN or width == q.shape[-1] == k.shape[-1]:
                return turn(q, k, cos, sin, form, unsqueeze_dim, casts)
        return original(q, k, cos, sin, *args, **kwargs)

    return apply


def turn(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, form: Form,
    unsqueeze_dim: int = 1, casts: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`rope` with what a form adds to it; casts: results have the dtype of q."""
    if form.once:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    turned = rope(
        q, k, cos, sin, form.interleaved, unsqueeze_dim, casts and cos.dtype is not q.dtype
    )
    return tuple(map(_apart, turned)) if form.apart else turned  # type: ignore[return-value]


def _apart(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def _complex_replacement(original: Callable[..., Any], dimension: int) -> Callable[..., Any]:
    def apply(xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor) -> Any:
        if freqs_cis.dim() == 3 and xq.dim() == xk.dim() == 4:
            parts = torch.view_as_real(freqs_cis)
            return turn(
                xq, xk, parts[..., 0], parts[..., 1], Form(True, once=True), dimension, True
            )
        return original(xq, xk, freqs_cis)

    return apply


def prove_rope(function: Callable[..., Any]) -> Form | None:
    """The form in which `function(q, k, cos, sin)` is `turn`; None if in none."""
    with _disable_current_modes(), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(1, 4, 5, 16, generator=generator)
        k = torch.randn(1, 2, 5, 16, generator=generator)
        tables = {width: torch.randn(2, 1, 5, width, generator=generator) for width in (16, 8)}
        results = {width: _result(function, q, k, *table) for width, table in tables.items()}

        def holds(form: Form, width: int) -> bool:
            cos, sin = tables[width]
            return _same(turn(q, k, cos, sin, form), results[width])

        matching = []
        for form in _FORMS:
            whole = 8 if form.once else 16
            # Forms that rotate the whole head refuse a narrower table: no proof against.
            narrow = form in _PLAIN and results[8] is not None
            if results[whole] is not None and holds(form, whole) and (not narrow or holds(form, 8)):
                matching.append(form)
    return matching[0] if len(matching) == 1 else None


def prove_complex(function: Callable[..., Any]) -> int | None:
    """The dimension that heads are in, 1 or 2, where `function(q, k, frequencies)` turns them.

    Heads are turned by complex numbers in float32, and keep their dtype.
    """
    with _disable_current_modes(), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        turns = torch.complex(*torch.randn(2, 1, 5, 8, generator=generator))
        parts = torch.view_as_real(turns)
        found = []
        for dimension in (1, 2):
            for dtype in (torch.float32, torch.bfloat16):
                q, k = (torch.randn(1, n, 5, 16, generator=generator).to(dtype) for n in (4, 2))
                if dimension == 2:
                    q, k = q.transpose(1, 2), k.transpose(1, 2)
                expected = _result(function, q, k, turns)
                form = Form(True, once=True)
                ours = turn(q, k, parts[..., 0], parts[..., 1], form, dimension, True)
                if expected is None or expected[0].dtype is not dtype or not _same(ours, expected):
                    break
            else:
                found.append(dimension)
    return found[0] if len(found) == 1 else None


def _result(function: Callable[..., Any], *args: torch.Tensor) -> Any:
    try:
        return function(*args)
    except (TypeError, RuntimeError, ValueError, AttributeError):
        return None


def returns_dtype_of_heads(function: Callable[..., Any], columns: int = 16) -> bool:
    """Whether heads of 16 turned by a table of a wider dtype come back in their own."""
    with _disable_current_modes(), torch.no_grad():
        heads, table = torch.ones(1, 2, 3, 16, dtype=torch.bfloat16), torch.ones(1, 3, columns)
        turned = function(heads, heads, table, table)
    return bool(turned[0].dtype is heads.dtype)


def _same(found: tuple[torch.Tensor, ...], expected: Any) -> bool:
    return len(expected) == len(found) and all(
        a.shape == b.shape
        and torch.allclose(a, b, rtol=1e-5 if a.dtype is torch.float32 else 1e-2, atol=1e-6)
        for a, b in zip(found, expected, strict=True)
    )
