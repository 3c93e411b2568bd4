"""Attention spelled out in few operations, so that there is one form of it to recognise.

baddbmm(x, a, b, beta=p, alpha=r)   becomes   p · x + r · bmm(a, b)
scaled_dot_product_attention(q, k, v, mask)   becomes   softmax(q kT · scale, masked) v
type_as(x, y)   becomes   x cast to the dtype that y is known to have
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autodeploy.custom_ops.attention import packed_mask

from ..program import Program
from ..transform import is_call

aten = torch.ops.aten

PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default})


def spell_out(program: Program) -> None:
    """Rewrites fused products and torch's own attention over tokens, in place."""
    for node in list(program.graph.nodes):
        if is_call(node, aten.baddbmm.default):
            _Speller(program, node).baddbmm()
        elif is_call(node, aten.type_as.default):
            _Speller(program, node).cast()
        elif is_call(node, aten.scaled_dot_product_attention.default) and all(
            str(n.meta["val"].shape[-2]) == str(program.inputs()["input_ids"].meta["val"].shape[1])
            for n in node.args[:2]
        ):
            _Speller(program, node).attention()


class _Speller:
    def __init__(self, program: Program, node: fx.Node) -> None:
        self._program = program
        self._node = node
        schema = node.target._schema  # type: ignore[union-attr]
        self._given: dict[str, Any] = {
            argument.name: argument.default_value for argument in schema.arguments
        }
        self._given.update(zip(self._given, node.args, strict=False))
        self._given.update(node.kwargs)

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self._program.call(target, *args, before=self._node, like=self._node, **kwargs)

    def _replace(self, result: fx.Node) -> None:
        self._node.replace_all_uses_with(result)
        self._program.graph.erase_node(self._node)

    def baddbmm(self) -> None:
        given = self._given
        result = self._call(aten.bmm.default, given["batch1"], given["batch2"])
        if given["alpha"] != 1:
            result = self._call(aten.mul.Tensor, result, given["alpha"])
        if given["beta"] != 0:
            bias = self._call(aten.mul.Tensor, given["self"], given["beta"])
            result = self._call(aten.add.Tensor, result, bias)
        self._replace(result)

    def cast(self) -> None:
        dtype = self._node.meta["val"].dtype
        self._replace(self._call(aten._to_copy.default, self._given["self"], dtype=dtype))

    def attention(self) -> None:
        given = self._given
        q, k, v = given["query"], given["key"], given["value"]
        if given["enable_gqa"]:
            groups = int(q.meta["val"].shape[-3]) // int(k.meta["val"].shape[-3])
            k, v = (self._call(aten.repeat_interleave.self_int, t, groups, -3) for t in (k, v))
        scale = given["scale"]
        scores = self._call(
            aten.mul.Tensor,
            self._call(aten.matmul.default, q, self._call(aten.transpose.int, k, -1, -2)),
            int(q.meta["val"].shape[-1]) ** -0.5 if scale is None else scale,
        )
        mask = given["attn_mask"]
        if given["is_causal"]:
            mask = self._causal_mask()
        if mask is not None and mask.meta["val"].dtype is torch.bool:
            hidden = self._call(aten.logical_not.default, mask)
            lowest = torch.finfo(scores.meta["val"].dtype).min
            scores = self._call(aten.masked_fill.Scalar, scores, hidden, lowest)
        elif mask is not None:
            scores = self._call(aten.add.Tensor, scores, mask)
        weights = self._call(aten.softmax.int, scores, -1)
        self._replace(self._call(aten.matmul.default, weights, v))

    def _causal_mask(self) -> fx.Node:
        inputs = self._program.inputs()
        tokens = self._call(aten.sym_size.int, inputs["input_ids"], 1)
        return self._call(packed_mask.overload, inputs["cu_q"], tokens, torch.bool)
