"""Op: what a graph node means, and every way to run it.

One object per idea. Its reference function *is* the meaning: it is what export records, what
the twin check compares against and what every faster implementation must equal. Choosing an
implementation is late: the `lower` transform asks `Op.choose` once per node.

    @register_op("scale_rows(Tensor x, Tensor weight) -> Tensor", axes="t d, t -> t d")
    def scale_rows(x, weight):
        return x * weight[:, None]

    @scale_rows.fake
    def _(x, weight):
        return torch.empty_like(x)

    @scale_rows.implement("triton", when=lambda c: c.device.type == "cuda", priority=10)
    def _(x, weight): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .contract import CacheSpec
from .cost import Cost

NAMESPACE = "autodeploy"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")

OPS: dict[str, Op] = {}
"""Every registered op by name."""


class OpError(Exception):
    """An op is declared wrongly or asked for something it cannot do."""


@dataclass(frozen=True)
class Choice:
    """What an implementation's `when` may look at: the node's arguments, as fake tensors."""

    device: torch.device
    args: Mapping[str, Any]
    """Arguments by schema name: fake tensors, numbers, strings or None."""


@dataclass(frozen=True)
class Implementation:
    """One way to run an op. Higher `priority` wins among those whose `when` holds."""

    name: str
    function: Callable[..., Any]
    when: Callable[[Choice], bool]
    priority: int
    capturable: bool = False
    """Never waits for the device and takes no size from a tensor's values: a CUDA graph can hold
    it."""


@dataclass(frozen=True)
class Cached:
    """How an op that mixes tokens runs when earlier tokens are only in a cache.

    The `cache` transform binds the cached op's arguments *by name*: an argument the functional
    op also has keeps its value, one named by `caches` becomes a cache input of the graph, every
    other one is step metadata the runtime stages under that name (see `contract.METADATA`).
    """

    op: Op
    caches: Callable[[Mapping[str, Any]], tuple[CacheSpec, ...]]
    """From the functional node's arguments (fake tensors) to the caches one site needs."""


@dataclass(eq=False)
class Op:
    """A named operation: reference, shape rule, axis rule, cost and implementations."""

    name: str
    schema: str
    reference: Callable[..., Any]
    axes: str | None = None
    """Sharding rule in the notation of the design, section 5; None pins every axis."""
    mutates: bool = False
    capturable: bool = False
    """Of the reference; see `Implementation.capturable`."""
    cached: Cached | None = None
    cost: Callable[[Mapping[str, Any]], Cost] | None = None
    """From one call's arguments by schema name (fake tensors) to what it costs, the weights among
    them included."""
    implementations: list[Implementation] = field(default_factory=list)
    shape_rule: Callable[..., Any] | None = None

    @property
    def overload(self) -> Any:
        """The `torch.ops` overload that graph nodes call."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

    @property
    def arguments(self) -> tuple[str, ...]:
        """Argument names in schema order."""
        return tuple(argument.name for argument in self.overload._schema.arguments)

    def is_list(self, name: str) -> bool:
        """Whether an argument is a list of tensors."""
        argument = next(a for a in self.overload._schema.arguments if a.name == name)
        return str(argument.type) == "List[Tensor]"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.overload(*args, **kwargs)

    def fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Registers the shape rule: same arguments, returns tensors of the right shape."""
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", function, lib=_library)
        self.shape_rule = function
        return function

    def dispatched(self, implementation: Implementation) -> Any:
        """An overload of `torch.ops` that runs one implementation: what a compiler can call."""
        if implementation.name == "reference":
            return self.overload
        name = f"{self.name}__{implementation.name}"
        namespace = getattr(torch.ops, NAMESPACE)
        if not hasattr(namespace, name):
            _library.define(name + self.schema[len(self.name) :])
            _library.impl(name, implementation.function, "CompositeExplicitAutograd")
            if self.shape_rule is not None:
                torch.library.register_fake(f"{NAMESPACE}::{name}", self.shape_rule, lib=_library)
        return getattr(namespace, name).default

    def implement(
        self,
        name: str,
        *,
        when: Callable[[Choice], bool],
        priority: int = 1,
        capturable: bool = False,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Registers one way to run the op. The function takes the op's arguments, positionally."""
        if name == "reference" or any(i.name == name for i in self.implementations):
            raise OpError(f"op '{self.name}' already has an implementation '{name}'")

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self.implementations.append(Implementation(name, function, when, priority, capturable))
            return function

        return register

    def implementation(self, name: str) -> Implementation:
        """An implementation by name.

        Raises:
            OpError: there is none of that name.
        """
        for implementation in [self._reference(), *self.implementations]:
            if implementation.name == name:
                return implementation
        raise OpError(f"op '{self.name}' has no implementation '{name}'")

    def _reference(self) -> Implementation:
        return Implementation("reference", self.reference, lambda _: True, 0, self.capturable)

    def choose(self, choice: Choice, prefer: Iterable[str] = ()) -> Implementation:
        """The implementation to run at one node; the reference when none applies.

        `prefer` names implementations to take first when they apply.
        """
        possible = [self._reference(), *(i for i in self.implementations if i.when(choice))]
        for name in prefer:
            for implementation in possible:
                if implementation.name == name:
                    return implementation
        return max(possible, key=lambda i: i.priority)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of one call by schema name, defaults filled in."""
        bound: dict[str, Any] = {}
        for index, argument in enumerate(self.overload._schema.arguments):
            if index < len(args):
                bound[argument.name] = args[index]
            elif argument.name in kwargs:
                bound[argument.name] = kwargs[argument.name]
            elif argument.has_default_value():
                bound[argument.name] = argument.default_value
            else:
                raise OpError(f"op '{self.name}' is called without '{argument.name}'")
        return bound


def register_op(
    schema: str, *, axes: str | None = None, capturable: bool = False
) -> Callable[[Callable[..., Any]], Op]:
    """Makes an `Op` of a reference function.

    schema: in torch's notation; arguments that are written to are marked `Tensor(a!)`.
    capturable: the reference never waits for the device (see `Implementation`).
    Raises:
        OpError: the name is taken.
    """
    name = schema.split("(", 1)[0].strip()
    if name in OPS:
        raise OpError(f"op '{name}' is already registered; choose another name")

    def register(reference: Callable[..., Any]) -> Op:
        _library.define(schema)
        _library.impl(name, reference, "CompositeExplicitAutograd")
        op = Op(name, schema, reference, axes, "!" in schema, capturable)
        OPS[name] = op
        return op

    return register


def function_of(target: Any) -> Callable[..., Any] | None:
    """What an overload of ours runs, as `Op.dispatched` made it; None for other functions."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != NAMESPACE:
        return None
    name, _, way = target._schema.name.split("::")[1].partition("__")
    return OPS[name].implementation(way or "reference").function


def op_of(target: Any) -> Op | None:
    """The `Op` behind a graph node's target, or None for a plain torch function."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE:
        return OPS.get(target._schema.name.split("::")[1])
    return None
