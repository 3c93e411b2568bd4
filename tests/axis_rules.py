"""Axis rules of ops, read and applied: what the brute-force tests of every rule share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from autodeploy.custom_ops.op import Op


def _dimensions(term: str) -> list[list[str]]:
    """One list of axis names per dimension: 't^ (g r) n^' is [['t^'], ['g', 'r'], ['n^']]."""
    for bracket in "()":
        term = term.replace(bracket, f" {bracket} ")
    found: list[list[str]] = []
    group: list[str] | None = None
    for word in term.split():
        if word == "(":
            group = []
        elif word == ")":
            assert group is not None
            found.append(group)
            group = None
        elif group is not None:
            group.append(word)
        else:
            found.append([word])
    return found


def _split(
    tensor: Tensor,
    dimensions: list[list[str]],
    axis: str | None,
    sizes: Mapping[str, int],
    half: int,
) -> Tensor:
    for index, names in enumerate(dimensions):
        if axis in names:
            shape = [sizes[name] for name in names]
            position = names.index(axis)
            parts = tensor.unflatten(index, shape).chunk(2, index + position)
            return parts[half].flatten(index, index + len(names) - 1)
    return tensor


def check_axes(
    op: Op,
    arguments: Mapping[str, Any],
    sizes: Mapping[str, int],
    close: Callable[[Tensor, Tensor], None],
) -> None:
    """Splits every axis without ^ in two, runs the halves apart and puts them together again.

    sizes: of every such axis, at least. close: asserts that two results are equal.
    """
    assert op.axes is not None
    left, right = op.axes.split("->")
    terms = [_dimensions(term) for term in left.split(",")]
    result = _dimensions(right)
    tensors = [a.name for a in op.overload._schema.arguments if "Tensor" in str(a.type)]
    axes = {name for term in terms for names in term for name in names if "^" not in name}
    assert axes <= set(sizes)
    for name, term in zip(tensors, terms, strict=True):
        assert arguments[name].dim() == len(term)

    def run(axis: str | None = None, half: int = 0) -> Tensor:
        called = dict(arguments)
        for name, term in zip(tensors, terms, strict=True):
            # A copy each time: the cached forms write to their states.
            called[name] = _split(arguments[name].clone(), term, axis, sizes, half).contiguous()
        return op(**called)

    expected = run()
    for axis in sorted(axes):
        ((index, names),) = [(i, names) for i, names in enumerate(result) if axis in names]
        shape = [sizes[name] // (2 if name == axis else 1) for name in names]
        halves = [run(axis, half).unflatten(index, shape) for half in range(2)]
        whole = torch.cat(halves, index + names.index(axis))
        close(whole.flatten(index, index + len(names) - 1), expected)
