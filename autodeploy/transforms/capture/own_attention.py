"""Attention that a model computes with code of its own becomes one `attention` node.

    scores = matmul(q, kT)                     # two operands made of tokens
    w = softmax(f(scores))                     # f: scales, masks, adds what positions give
    y = matmul(dropout(w), v)
becomes
    y = autodeploy.attention(q, k, v, cu_q, scale, window=.., alibi_slopes=..)

No form of f is looked for: whatever lies between the product and the softmax is run for one
sequence alone (`single_sequence`) and told by its values (`score_form`). A softmax over keys
that is not shown to be attention the op expresses is refused, because as it stands it would mix
the sequences of a packed batch and have no cache.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from autodeploy.custom_ops.attention import attention, packed_mask

from ...errors import CaptureError
from ..program import Program, Weight, origin
from ..transform import is_call
from .attention_primitives import spell_out
from .attention_sites import LAYOUT, SOFTMAX, Site, SiteReader, operand_of, over_keys
from .score_form import ScoreForm
from .single_sequence import is_tokens

aten = torch.ops.aten


def recognise_attention(program: Program) -> int:
    """Rewrites every softmax attention in plain operations; returns how many there were.

    Raises:
        CaptureError: a softmax over keys is nothing the attention op expresses.
    """
    for node in list(program.graph.nodes):
        if is_call(node, aten._assert_tensor_metadata.default):
            program.graph.erase_node(node)
    spell_out(program)
    count = 0
    reader = SiteReader(program)
    for node in list(program.graph.nodes):
        if is_call(node, *SOFTMAX) and node in reader.content and over_keys(program, node):
            site = reader.site(node)
            try:
                _rewrite(program, site, reader.form(site), reader)
            except CaptureError as error:
                raise CaptureError(f"{site.where}: {error}") from error
            count += 1
    program.remove_unused()
    for node in program.graph.nodes:
        if is_call(node, packed_mask.overload):
            user = next(iter(node.users))
            raise CaptureError(
                f"{origin(user)} uses its mask as a tensor outside of any attention that was "
                "recognised"
            )
    return count


def _rewrite(program: Program, site: Site, form: ScoreForm, reader: SiteReader) -> None:
    reader.check_weights(site)
    q, k = operand_of(site.scores, 0), operand_of(site.scores, 1)
    v = operand_of(site.mixed, 1)
    heads = math.prod(int(e) for e in site.scores.meta["val"].shape[:-2])
    here = site.mixed
    for operand, axis in ((q, -2), (k, -1), (v, -2)):
        if not is_tokens(program, operand.meta["val"].shape[axis]):
            raise CaptureError("its keys are not the tokens of the sequence")
    _refuse_mismatch(q, k)
    repeated = math.gcd(reader.repeats(k), reader.repeats(v))
    keys = _tokens_first(program, site, k, [2, 0, 1], repeated)
    values = _tokens_first(program, site, v, [1, 0, 2], repeated)
    queries = _tokens_first(program, site, q, [1, 0, 2], 1)
    if queries.meta["val"].shape[1] != heads or heads % int(keys.meta["val"].shape[1]):
        raise CaptureError(f"its {heads} heads of scores do not come of as many queries")
    out = program.call(
        attention.overload, queries, keys, values, program.inputs()["cu_q"], form.scale,
        form.mask.window, form.mask.chunk, form.softcap, True, None,
        _slopes(program, form, here), before=here, like=site.softmax,
    )  # fmt: skip
    if out.meta["val"].dtype is not here.meta["val"].dtype:
        out = program.call(
            aten._to_copy.default, out, dtype=here.meta["val"].dtype, before=here, like=site.softmax
        )
    swapped = program.call(aten.transpose.int, out, 0, 1, before=here, like=site.softmax)
    lead = [int(e) for e in here.meta["val"].shape[:-2]]
    width = int(here.meta["val"].shape[-1])
    shaped = program.call(
        aten.reshape.default, swapped, [*lead, -1, width], before=here, like=site.softmax
    )
    here.replace_all_uses_with(shaped)
    program.graph.erase_node(here)


def _refuse_mismatch(q: fx.Node, k: fx.Node) -> None:
    """Keys may lack trailing head axes of the queries (then they are shared), nothing else."""
    ours, theirs = (list(n.meta["val"].shape[:-2]) for n in (q, k))
    while theirs and theirs[-1] == 1:
        theirs.pop()
    if len(k.meta["val"].shape) != len(q.meta["val"].shape) or ours[: len(theirs)] != theirs:
        raise CaptureError(f"queries of {tuple(ours)} heads meet keys of {tuple(theirs)}")


def _tokens_first(
    program: Program, site: Site, node: fx.Node, order: list[int], repeated: int
) -> fx.Node:
    """[*heads, ., .] -> [T, H, D], one head of every `repeated` in a row."""
    shape = node.meta["val"].shape
    heads = math.prod(int(e) for e in shape[:-2])
    sizes = [-1 if isinstance(e, torch.SymInt) else int(e) for e in shape[-2:]]

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return program.call(target, *args, before=site.mixed, like=site.softmax, **kwargs)

    narrow = _widened_from(node)
    if narrow is not None:
        # The op computes in float32 of what it is given, and caches are kept as they come.
        node = call(aten._to_copy.default, node, dtype=narrow)
    flat = call(aten.reshape.default, node, [heads, *sizes])
    if repeated > 1:
        flat = call(aten.slice.Tensor, flat, 0, 0, heads, repeated)
    return call(aten.permute.default, flat, order)


def _widened_from(node: fx.Node) -> torch.dtype | None:
    """The narrower dtype of which `node` holds nothing but casts, if that is what it is."""
    dtype = node.meta["val"].dtype
    while is_call(node, *LAYOUT):
        node = operand_of(node, 0)
        narrow = node.meta["val"].dtype
        if narrow.itemsize < dtype.itemsize and narrow.is_floating_point:
            return narrow
    return None


def _slopes(program: Program, form: ScoreForm, before: fx.Node) -> fx.Node | None:
    if form.slopes is None:
        return None
    name = f"alibi_slopes_{sum(n.startswith('alibi_slopes_') for n in program.weights)}"
    tensor = torch.tensor(form.slopes, dtype=torch.float32, device=program.contract.device)
    program.source.add(name, tensor)
    return program.add_weight(name, Weight((name,), tuple(tensor.shape), tensor.dtype), before)
