"""A module that loops over experts in code of its own becomes an `autodeploy::experts` node.

Such loops have shapes that depend on the data, or send every token through every expert. What
they compute is proved: the module runs on random numbers, its weights random too, and is compared
with the experts op under every reading of its stacks (`expert_stacks`) and of its routing
(`expert_routing`) that the shapes allow. A module that agrees with none runs its own code.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from autodeploy.custom_ops.moe import ACTIVATIONS, experts

from ...errors import VerificationError
from .expert_routing import Given, Lookup, Routing, routings
from .expert_stacks import Layout, Stacking, layouts, stackings
from .interception import Interception

Values = Mapping[str, torch.Tensor]
Form = tuple[tuple[str, bool, tuple[int | None, ...]], ...]
"""Tensor arguments: name, whether it holds integers, sizes; None is the number of tokens."""

_TOLERANCE = 1e-5
_FEW = 3
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """What a module computes."""

    hidden: str
    routing: Routing
    stacking: Stacking
    layout: Layout
    activation: str
    addend: str = ""
    """A parameter [H] that is added to the result."""

    def __call__(self, parameters: Values, hidden: torch.Tensor, lookup: Lookup) -> torch.Tensor:
        """hidden [T, H] -> [T, H]."""
        index, weights = self.routing.of(lookup)
        arguments = self.layout.arguments(parameters)
        out: torch.Tensor = experts(hidden, index, weights, activation=self.activation, **arguments)
        if self.stacking.total > self.layout.down.experts:
            # The others give back what they are given.
            share = (weights * (index >= self.layout.down.experts)).sum(-1, keepdim=True)
            out = out + (hidden * share).to(hidden.dtype)
        return out + parameters[self.addend] if self.addend else out


def intercept_expert_loops(scope: Interception, model: nn.Module) -> None:
    """Makes nodes of the loops over experts in `model`'s layers while `scope` is open."""
    from ..verify.twin import layer_list

    try:
        layers = list(layer_list(model))
    except VerificationError as error:
        _log.info("no expert loops are looked for: %s", error)
        return
    found: dict[Any, Reading | None] = {}
    for layer in layers:
        for module in list(layer.modules())[1:]:
            # Modules of transformers' experts interface carry its flags.
            known = any("has_gate" in vars(part) for part in module.modules())
            if not known and _may_loop(module) and not _holds_loop(module):
                scope.set_attribute(module, "forward", _forward(module, found))


def _holds_loop(module: nn.Module) -> bool:
    """Whether a part of it is told the routing: what is around that part is its own code, and a
    search there would cost every reading."""
    return any(
        len(inspect.signature(part.forward).parameters) > 1 and _fits(part, set())
        for part in list(module.modules())[1:]
    )


def _may_loop(module: nn.Module) -> bool:
    # Any matrix could be a flattened stack: only indices and weights say that there are experts.
    routed = len(inspect.signature(module.forward).parameters) > 2
    return _fits(module, _numbers(module) if routed else set())


def _fits(module: nn.Module, numbers: set[int]) -> bool:
    if isinstance(module, nn.ModuleList):
        return False
    return any(
        stacking.fits(size)
        for stacking in stackings(module, numbers)
        for size in {s for stack in stacking.stacks for s in (stack.rows, stack.columns)}
    )


def _forward(module: nn.Module, found: dict[Any, Reading | None]) -> Callable[..., Any]:
    from ..verify.twin import kind_of

    own = module.forward
    signature = inspect.signature(own)
    buffers = dict(module.named_buffers())

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        form = _form(given)
        if form is None:
            return own(*args, **kwargs)
        kind = (kind_of(module), form)
        if kind not in found:
            found[kind] = _reading(module, form, given, buffers)
        reading = found[kind]
        if reading is None:
            return own(*args, **kwargs)
        hidden = given[reading.hidden]
        flat = hidden.flatten(0, -2)

        def lookup(name: str) -> torch.Tensor:
            return given[name] if name in given else module.get_submodule(name)(flat)

        parameters = dict(module.named_parameters(remove_duplicate=False))
        return reading(parameters, flat, lookup).view(hidden.shape)

    return forward


def _reading(
    module: nn.Module, form: Form, given: Mapping[str, Any], buffers: Values
) -> Reading | None:
    """What the module was shown to compute, if it is a layer of experts."""
    if any(b.is_meta or isinstance(b, FakeTensor) for b in buffers.values()):
        _log.info("%s: its buffers have no values, so nothing is proved", type(module).__name__)
        return None
    with _disable_current_modes(), torch.no_grad():
        return _Proof(module, form, given, buffers).reading()


def _form(given: Mapping[str, Any]) -> Form | None:
    """The form of a call while it is traced; None: it is not one of a layer of experts."""
    sizes: set[str] = set()
    form = []
    for name, value in given.items():
        if not isinstance(value, torch.Tensor):
            if value is None or (isinstance(value, (bool, dict)) and not value):
                continue
            return None
        shape = tuple(None if isinstance(n, torch.SymInt) else int(n) for n in value.shape)
        sizes |= {str(n) for n in value.shape if isinstance(n, torch.SymInt)}
        if shape.count(None) != 1 or len(shape) not in (2, 3) or shape[0] not in (None, 1):
            return None
        form.append((name, not value.is_floating_point(), shape))
    return tuple(form) if len(sizes) == 1 else None


def _numbers(module: nn.Module) -> set[int]:
    """Whole numbers that a module, its parts and their configs hold: counts of something."""
    numbers: set[int] = set()
    for part in module.modules():
        for value in vars(part).values():
            held = value.to_dict().values() if hasattr(value, "to_dict") else (value,)
            numbers |= {n for n in held if type(n) is int}
    return numbers


class _Proof:
    """One module run on random numbers."""

    def __init__(
        self, module: nn.Module, form: Form, given: Mapping[str, Any], buffers: Values
    ) -> None:
        self._form = form
        self._others = {k: v for k, v in given.items() if not isinstance(v, torch.Tensor)}
        self._numbers = _numbers(module)
        self._generator = torch.Generator().manual_seed(0)
        self._parameters = {
            name: self._weight(tuple(p.shape))
            for name, p in module.named_parameters(remove_duplicate=False)
        }
        self._module = _copied(module, self._parameters, buffers)

    def reading(self) -> Reading | None:
        """What the module was shown to compute, if it is an experts layer."""
        name = type(self._module).__name__
        chooses = any(integers for _, integers, _ in self._form)
        for stacking in stackings(self._module, self._numbers):
            if stacking.flattened and not chooses:
                continue
            try:
                found = next(self._agreeing(stacking), None)
            except Exception as error:  # noqa: BLE001 - code of any kind, given numbers of ours
                _log.info("%s does not run as %d experts: %s", name, stacking.total, error)
                continue
            if found is not None:
                return found
        return None

    def _agreeing(self, stacking: Stacking) -> Iterator[Reading]:
        for hidden, integers, shape in self._form:
            size = shape[-1]
            if integers or size is None or not stacking.fits(size):
                continue
            few = self._run(hidden, stacking.total, _FEW)
            if few is None:
                continue
            for reading in self._readings(stacking, hidden, size, few):
                close = self._closest(reading, few)
                if close is not None and self._holds(close):
                    yield close

    def _readings(self, stacking: Stacking, hidden: str, size: int, run: _Run) -> Iterator[Reading]:
        for routing in routings(run.tensors, hidden, stacking.total, self._numbers):
            prefix = "" if isinstance(routing, Given) else f"{routing.source}."
            stacks = [
                s for s in stacking.stacks if not prefix or not s.pieces[0].startswith(prefix)
            ]
            for layout in layouts(stacks, size):
                for activation in ACTIVATIONS:
                    yield Reading(hidden, routing, stacking, layout, activation)

    def _closest(self, reading: Reading, run: _Run) -> Reading | None:
        """The reading, or with a parameter added, if it agrees on a few tokens."""
        rest = run.output - reading(self._parameters, run.hidden, run.tensors.__getitem__)
        if _small(rest, run.output):
            return reading
        for name, value in self._parameters.items():
            if value.shape == rest.shape[1:] and _small(rest - value, run.output):
                return Reading(**{**vars(reading), "addend": name})
        return None

    def _holds(self, reading: Reading) -> bool:
        """Whether it agrees on two other numbers of tokens, every expert being taken."""
        taken: set[int] = set()
        total = reading.stacking.total
        for tokens in (4 * total + 1, 6 * total + 2):
            run = self._run(reading.hidden, total, tokens)
            if run is None:
                return False
            found = reading(self._parameters, run.hidden, run.tensors.__getitem__)
            if not _small(found - run.output, run.output):
                return False
            taken |= set(reading.routing.of(run.tensors.__getitem__)[0].flatten().tolist())
        return taken == set(range(total))

    def _run(self, hidden: str, total: int, tokens: int) -> _Run | None:
        """The module's own result for random tokens."""
        arguments = {
            name: self._argument(integers, [n or tokens for n in shape], total)
            for name, integers, shape in self._form
        }
        flat = arguments[hidden].flatten(0, -2)
        tensors = dict(arguments)
        handles = []

        def watch(path: str, part: nn.Module) -> None:
            def leave(_: nn.Module, args: Any, output: Any) -> None:
                if isinstance(output, torch.Tensor) and _same_rows(args, flat):
                    tensors[path] = output

            handles.append(part.register_forward_hook(leave))

        for path, part in self._module.named_modules():
            if path:
                watch(path, part)
        try:
            copies = {name: value.clone() for name, value in arguments.items()}
            output = self._module(**self._others, **copies)
        finally:
            for handle in handles:
                handle.remove()
        if not isinstance(output, torch.Tensor) or output.shape != arguments[hidden].shape:
            return None
        return _Run(tensors, flat, output.reshape(flat.shape))

    def _argument(self, integers: bool, shape: list[int], total: int) -> torch.Tensor:
        """Numbers, or different experts for each token."""
        if not integers:
            return torch.randn(shape, generator=self._generator)
        order = torch.rand((*shape[:-1], total), generator=self._generator).argsort(-1)
        return order[..., : shape[-1]].contiguous()

    def _weight(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Random weights of unit gain. Rows are windows of one run of numbers: that takes no
        memory, and experts may have many gigabytes."""
        if len(shape) < 2:
            return torch.randn(shape, generator=self._generator)
        rows = torch.Size(shape[:-1]).numel()
        numbers = torch.randn(2 * rows + shape[-1], generator=self._generator) * shape[-1] ** -0.5
        strides = [2]
        for size in reversed(shape[1:-1]):
            strides.insert(0, strides[0] * size)
        return numbers.as_strided(shape, (*strides, 1))


def _copied(module: nn.Module, parameters: Values, buffers: Values) -> nn.Module:
    """The module with other weights, and without hooks: a trace that is going on counts calls of
    the module itself."""
    memo: dict[int, Any] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        memo[id(parameter)] = parameters[name]
    for name, buffer in module.named_buffers():
        memo[id(buffer)] = buffers[name].cpu()
    made = copy.deepcopy(module, memo)
    for part in made.modules():
        vars(part).pop("forward", None)
    return made


@dataclass(frozen=True)
class _Run:
    """tensors: arguments, and what parts of the module gave for the hidden states; hidden and
    output [T, H]."""

    tensors: Values
    hidden: torch.Tensor
    output: torch.Tensor


def _same_rows(args: tuple[Any, ...], rows: torch.Tensor) -> bool:
    given = args[0] if len(args) == 1 else None
    if not isinstance(given, torch.Tensor) or given.numel() != rows.numel():
        return False
    return torch.equal(given.reshape(rows.shape), rows)


def _small(rest: torch.Tensor, like: torch.Tensor) -> bool:
    return bool(rest.abs().max() <= _TOLERANCE * like.abs().max())
