"""Where a model computes attention in plain operations, and what it does there.

A site is a softmax over keys with the product it is made of and the product it goes into. What
lies between is not matched with any form: it is run, for one sequence alone, and told by values.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autodeploy.custom_ops.attention import cache_mark, packed_mask
from autodeploy.custom_ops.rope import rope

from ...errors import CaptureError
from ..program import Program, origin
from ..transform import is_call
from .attention_primitives import PRODUCTS
from .masks import Mask
from .score_form import ScoreForm, score_form
from .single_sequence import SingleSequence, content_nodes, is_tokens
from .structure import Structure

aten = torch.ops.aten

SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})
LAYOUT = frozenset(
    {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default,
     aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim,
     aten.clone.default, aten.contiguous.default, aten.repeat_interleave.self_int,
     aten._to_copy.default, aten.repeat.default, aten.flatten.using_ints}
)  # fmt: skip
_REARRANGE = LAYOUT | {
    aten.select.int, aten.slice.Tensor, aten.cat.default, aten.stack.default, aten.split.Tensor,
    aten.split_with_sizes.default, aten.chunk.default, aten.broadcast_to.default,
    operator.getitem, rope.overload, cache_mark.overload,
}  # fmt: skip
_LENGTHS = (61, 192)
# Numbers in one score tensor of the longest evaluation: where a mask is the model's own, it has
# to be read as far as the model goes (32 heads of 2048 tokens), else far less will do.
_OWN_MASK_NUMBERS = 1 << 27
_NUMBERS = 1 << 22
_NO_LIMIT = 2048


@dataclass(frozen=True)
class Site:
    """One attention in plain operations."""

    softmax: fx.Node
    scores: fx.Node
    """q kT, [*heads, T, T]."""
    mixed: fx.Node
    """weights v, [*heads, T, Dv]."""

    @property
    def where(self) -> str:
        return f"attention of {origin(self.softmax)}"


def over_keys(program: Program, node: fx.Node) -> bool:
    """Whether a node has a row of keys for each query: [.., T, T]."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return False
    return all(is_tokens(program, e) for e in value.shape[-2:])


class SiteReader:
    """Finds sites and tells their forms; layers that do the same are evaluated once."""

    def __init__(self, program: Program) -> None:
        self.content = content_nodes(program)
        self._program = program
        self._structure = Structure(program)
        self._forms: dict[Any, ScoreForm] = {}

    def site(self, softmax: fx.Node) -> Site:
        """The products around a softmax.

        Raises:
            CaptureError: what goes into it, or comes of it, is no attention.
        """
        where = f"attention of {origin(softmax)}"
        if softmax.args[1] not in (-1, softmax.meta["val"].dim() - 1):
            raise CaptureError(f"{where}: its softmax is over queries, not over keys")
        products = [n for n in self._above(softmax, where) if self._is_product(n)]
        if len(products) != 1:
            raise CaptureError(
                f"{where}: its scores are made of {len(products)} products of tokens, not of one"
            )
        node, chain = softmax, []
        while True:
            users = [u for u in node.users if u.op != "output"]
            if len(users) != 1 or len(users) != len(node.users):
                raise CaptureError(f"{where}: its weights are used {len(users)} times, not once")
            chain.append(node)
            node = users[0]
            if is_call(node, *PRODUCTS) and node.args[0] is chain[-1]:
                return Site(softmax, products[0], node)
            if not all(n is chain[-1] or n not in self.content for n in node.all_input_nodes):
                raise CaptureError(f"{where}: its weights are not multiplied with values")

    def _above(self, softmax: fx.Node, where: str) -> list[fx.Node]:
        """Content nodes from the softmax up to the product of queries and keys."""
        found: dict[fx.Node, None] = {}
        waiting = [softmax]
        while waiting:
            node = waiting.pop()
            if node in found or node not in self.content:
                continue
            found[node] = None
            if self._is_product(node):
                continue
            if node.op != "call_function" or not over_keys(self._program, node):
                raise CaptureError(
                    f"{where}: its bias is no function the attention op expresses: it depends "
                    f"on the content of tokens ({node.name})"
                )
            waiting.extend(node.all_input_nodes)
        return list(found)

    def _is_product(self, node: fx.Node) -> bool:
        return (
            is_call(node, *PRODUCTS)
            and over_keys(self._program, node)
            and all(n in self.content for n in node.args)
        )

    def form(self, site: Site) -> ScoreForm:
        """What the layer does to its scores.

        Raises:
            CaptureError: nothing the attention op expresses.
        """
        key = self._structure.key(_input(site.softmax), site.scores)
        if key not in self._forms:
            self._forms[key] = self._read(site)
        return self._forms[key]

    def _read(self, site: Site) -> ScoreForm:
        heads = math.prod(int(e) for e in site.scores.meta["val"].shape[:-2])
        known = self._known_mask(site, heads)
        limit = self._program.contract.max_positions or _NO_LIMIT
        numbers = _NUMBERS if known is not None else _OWN_MASK_NUMBERS
        longest = min(limit, _NO_LIMIT if known else limit, math.isqrt(numbers // heads))
        if known is None and longest < limit and self._program.contract.max_positions:
            raise CaptureError(
                f"its mask is made of tensors of its own and can be checked for {longest} of "
                f"{limit} positions only"
            )
        lengths = sorted({min(n, longest) for n in (*_LENGTHS, longest)})
        functions = [(n, self.function(site, n, heads)) for n in lengths]
        return score_form(functions, heads, known, torch.finfo(self._program.contract.dtype).eps)

    def _known_mask(self, site: Site, heads: int) -> Mask | None:
        """The mask of the layer if `packed_mask` nodes are all that masks it, else None."""
        above = self._structure.above(_input(site.softmax), site.scores)
        pairs = [n for n in above if n is not site.scores and over_keys(self._program, n)]
        nodes = [n for n in pairs if is_call(n, packed_mask.overload)]
        masks = {_mask_of(n) for n in nodes}
        made_here = [n for n in pairs if not any(i in pairs for i in n.all_input_nodes)]
        if len(masks) != 1 or any(
            n not in nodes and site.scores not in n.all_input_nodes for n in made_here
        ):
            # Something else tells pairs of tokens apart, perhaps beyond any length tried here.
            return None
        length = _LENGTHS[0]
        open_masks = {n: _no_mask(n, length) for n in nodes}
        base = self.function(site, length, heads, open_masks)(torch.zeros(heads, length, length))
        return masks.pop() if bool((base > base.amax(-1, keepdim=True) - 9e3).all()) else None

    def function(
        self, site: Site, length: int, heads: int, given: dict[fx.Node, Any] | None = None
    ) -> Any:
        """What is done to scores [H, T, T] before the softmax, for one sequence."""
        sequence = SingleSequence(self._program, length)
        shape = sequence.shape(site.scores)

        def run(scores: torch.Tensor) -> torch.Tensor:
            # In float32 whatever the model's dtype: a scale read off bfloat16 is 1e-4 off.
            raw = scores.reshape(shape).to(self._program.contract.device)
            out = sequence.value(_input(site.softmax), {**(given or {}), site.scores: raw})
            return out.float().expand(sequence.shape(site.softmax)).reshape(scores.shape).cpu()

        return run

    def check_weights(self, site: Site) -> None:
        """Raises CaptureError unless the softmax's weights reach the values unchanged."""
        length = 7
        sequence = SingleSequence(self._program, length)
        generator = torch.Generator().manual_seed(0)
        weights = torch.rand(sequence.shape(site.softmax), generator=generator)
        value = site.softmax.meta["val"]
        weights = weights.to(self._program.contract.device, value.dtype)
        used = sequence.value(operand_of(site.mixed, 0), {site.softmax: weights})
        if used.numel() != weights.numel() or not torch.equal(
            used.flatten(), weights.to(used.dtype).flatten()
        ):
            raise CaptureError("its weights are changed between the softmax and the values")

    def repeats(self, operand: fx.Node) -> int:
        """How many heads in a row of `operand` [*heads, ., .] are copies of one.

        Shown by making the operand of random numbers: copies stay equal whatever those are.
        """
        sequence = SingleSequence(self._program, 3)
        generator = torch.Generator().manual_seed(0)
        given = {}
        for source in self._sources(operand):
            value = source.meta["val"]
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                return 1
            random = torch.randn(sequence.shape(source), generator=generator)
            given[source] = random.to(self._program.contract.device, value.dtype)
        found = sequence.value(operand, given)
        found = found.reshape(-1, *found.shape[-2:])
        for size in (n for n in range(len(found), 1, -1) if len(found) % n == 0):
            groups = found.unflatten(0, (-1, size))
            if bool((groups == groups[:, :1]).all()):
                return size
        return 1

    def _sources(self, operand: fx.Node) -> list[fx.Node]:
        """The nearest nodes above `operand` that are more than rearranged, scaled or rotated."""
        found: dict[fx.Node, None] = {}
        seen: set[fx.Node] = set()
        waiting = [operand]
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if node not in self.content:
                # Rotation angles and the like: what holds for any holds without their values.
                value = node.meta.get("val")
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    found[node] = None
            elif is_call(node, *_REARRANGE) or torch.Tag.pointwise in getattr(
                node.target, "tags", ()
            ):
                waiting.extend(node.all_input_nodes)
            else:
                found[node] = None
        return list(found)


def _input(softmax: fx.Node) -> fx.Node:
    return operand_of(softmax, 0)


def operand_of(node: fx.Node, index: int) -> fx.Node:
    operand = node.args[index]
    if not isinstance(operand, fx.Node):
        raise CaptureError(f"{origin(node)}: operand {index} of {node.name} is no tensor")
    return operand


def _mask_of(node: fx.Node) -> Mask:
    given = packed_mask.bind(node.args, node.kwargs)
    return Mask(given["causal"], given["window"], given["chunk"])


def _no_mask(node: fx.Node, length: int) -> torch.Tensor:
    """In place of a packed mask: everything is seen."""
    value = node.meta["val"]
    seen = value.dtype is torch.bool
    return torch.full((1, 1, length, length), seen, dtype=value.dtype, device=value.device)
