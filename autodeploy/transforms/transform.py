"""Transform: one rewrite of the graph, split into finding sites and rewriting one.

From the split come match counts, dry runs and bisection; the driver in `pipeline.py` owns
timing, dumps, checks and progress, so no transform does. A transform is a frozen dataclass: its
fields are its options in a recipe.

    @register_transform("fold_scale")
    @dataclass(frozen=True)
    class FoldScale(Transform):
        needs = frozenset({Fact.CANONICAL})
        limit: float = 1.0

        def sites(self, program): ...
        def rewrite(self, program, site): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import fx

from ..errors import RecipeError
from .program import Fact, Program, origin

if TYPE_CHECKING:
    import sympy

TRANSFORMS: dict[str, type[Transform]] = {}
"""Every registered transform by its name in recipes."""


@dataclass(frozen=True)
class Site:
    """One place a transform applies to. `nodes` is whatever `rewrite` needs, anchor first."""

    nodes: tuple[fx.Node, ...]
    note: str = ""

    @property
    def where(self) -> str:
        """The place as a person reads it."""
        return self.note or origin(self.nodes[0])


@dataclass(frozen=True)
class Transform:
    """Base of every transform.

    Valid before (`needs` hold), valid after (same logits, if `exact`).
    """

    name: ClassVar[str] = ""
    needs: ClassVar[frozenset[Fact]] = frozenset()
    gives: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()
    exact: ClassVar[bool] = True

    def sites(self, program: Program) -> Iterable[Site]:
        """The places to rewrite, found without changing anything."""
        raise NotImplementedError

    def gain(self, program: Program, site: Site) -> sympy.Expr | None:
        """Seconds saved by rewriting `site`, as an expression; None means always rewrite."""
        return None

    def rewrite(self, program: Program, site: Site) -> None:
        """Rewrites one site. Sites of one step do not overlap."""
        raise NotImplementedError

    def finish(self, program: Program) -> str | None:
        """After the last site: what is done once per program. The driver cleans dead nodes.

        Returns what a report should say beside the number of matches, if anything.
        """
        return None


def register_transform(name: str) -> Callable[[type[Transform]], type[Transform]]:
    """Makes a transform available to recipes.

    Raises:
        RecipeError: the name is taken.
    """

    def register(kind: type[Transform]) -> type[Transform]:
        taken = TRANSFORMS.get(name)
        if taken is not None and taken.__qualname__ != kind.__qualname__:
            raise RecipeError(f"transform '{name}' is already registered by {taken.__module__}")
        kind.name = name
        TRANSFORMS[name] = kind
        return kind

    return register


def is_call(node: Any, *targets: Any) -> bool:
    """Whether `node` calls one of `targets`."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets
