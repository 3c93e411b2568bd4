"""token_module, sequence_module, recurrent_module: nodes that call a model's own code.

They cost a Python call per sequence and layer, and nothing in them is fused: the honest price of
running what no op expresses. Everything around them stays packed, cached and scheduled as usual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..contract import CacheSpec
from ..op import Cached, register_op
from .calls import TokenCall, call_of


@register_op("token_module(Tensor[] inputs, str key) -> Tensor[]")
def token_module(inputs: Sequence[Tensor], key: str) -> list[Tensor]:
    """A part that treats every token alone, such as a routed feed-forward with a Python loop.

    inputs [T, ...] -> outputs [T, ...] of all tokens of all sequences.
    """
    return call_of(key).run(inputs)


@register_op("sequence_module(Tensor[] inputs, Tensor cu_q, str key) -> Tensor[]")
def sequence_module(inputs: Sequence[Tensor], cu_q: Tensor, key: str) -> list[Tensor]:
    """A part that mixes the tokens of a sequence and keeps something of each token.

    inputs [T, ...], cu_q [B + 1] int32 -> outputs [T, ...].
    """
    return _run_alone(inputs, cu_q, key)


@register_op("recurrent_module(Tensor[] inputs, Tensor cu_q, str key) -> Tensor[]")
def recurrent_module(inputs: Sequence[Tensor], cu_q: Tensor, key: str) -> list[Tensor]:
    """As `sequence_module`, of a part that keeps states of a fixed size only."""
    return _run_alone(inputs, cu_q, key)


@register_op(
    "cached_sequence_module(Tensor[] inputs, Tensor(a!)[] token_caches, Tensor(b!)[] states, "
    "Tensor cu_q, Tensor kv_len, Tensor block_table, Tensor slot, Tensor state_slot, str key) "
    "-> Tensor[]"
)
def cached_sequence_module(
    inputs: Sequence[Tensor],
    token_caches: Sequence[Tensor],
    states: Sequence[Tensor],
    cu_q: Tensor,
    kv_len: Tensor,
    block_table: Tensor,
    slot: Tensor,
    state_slot: Tensor,
    key: str,
) -> list[Tensor]:
    """`sequence_module` whose earlier tokens are in token_caches [pages, page_size, ...].

    states [slots, ...]; kv_len [B], block_table [B, W] int32; slot [T], state_slot [B] int64.
    """
    call = call_of(key)
    outputs = _empty(call, inputs)
    bounds, lengths, rows = cu_q.tolist(), kv_len.tolist(), state_slot.tolist()
    for index, (start, stop) in enumerate(pairwise(bounds)):
        if start == stop:
            continue
        earlier = lengths[index] - (stop - start)
        past = [_gather(cache, block_table[index], earlier) for cache in token_caches]
        new = _advance(call, inputs, outputs, past, states, rows[index], start, stop)
        for cache, kept in zip(token_caches, new, strict=True):
            cache.view(-1, *cache.shape[2:])[slot[start:stop]] = kept.to(cache.dtype)
    return outputs


@register_op(
    "cached_recurrent_module(Tensor[] inputs, Tensor(a!)[] states, Tensor cu_q, Tensor kv_len, "
    "Tensor state_slot, str key) -> Tensor[]"
)
def cached_recurrent_module(
    inputs: Sequence[Tensor],
    states: Sequence[Tensor],
    cu_q: Tensor,
    kv_len: Tensor,
    state_slot: Tensor,
    key: str,
) -> list[Tensor]:
    """`recurrent_module` that continues from states [slots, ...]."""
    call = call_of(key)
    outputs = _empty(call, inputs)
    bounds, lengths, rows = cu_q.tolist(), kv_len.tolist(), state_slot.tolist()
    for index, (start, stop) in enumerate(pairwise(bounds)):
        if start == stop:
            continue
        past: list[Tensor] | None = [] if lengths[index] > stop - start else None
        _advance(call, inputs, outputs, past, states, rows[index], start, stop)
    return outputs


def _run_alone(inputs: Sequence[Tensor], cu_q: Tensor, key: str) -> list[Tensor]:
    call = call_of(key)
    outputs = _empty(call, inputs)
    for start, stop in pairwise(cu_q.tolist()):
        if start < stop:
            results = call.run([tensor[start:stop] for tensor in inputs])
            _put(outputs, results, start, stop)
    return outputs


def _advance(
    call: TokenCall,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    past: Sequence[Tensor] | None,
    states: Sequence[Tensor],
    row: int,
    start: int,
    stop: int,
) -> list[Tensor]:
    """Runs one sequence's new tokens; returns what to keep per token.

    past: what was kept of earlier tokens; None, or rows of no length: there are none.
    """
    begins = past is None or (len(past) > 0 and len(past[0]) == 0)
    # Few models continue a recurrence over several tokens at once; all do it token by token.
    width = 1 if call.states and not begins else stop - start
    kept: list[list[Tensor]] = []
    before = list(past or ())
    for low in range(start, stop, width):
        new = [tensor[low : low + width] for tensor in inputs]
        if begins:
            results, rows, after = call.begin(new)
        else:
            results, rows, after = call.go_on(new, before, [state[row] for state in states])
        _put(outputs, results, low, low + width)
        for state, value in zip(states, after, strict=True):
            state[row] = value.to(state.dtype)
        kept.append(rows)
        if low + width < stop:
            before = [torch.cat(pair) for pair in zip(before, rows, strict=True)]
    return [torch.cat(parts) for parts in zip(*kept, strict=True)]


def _put(outputs: Sequence[Tensor], results: Sequence[Tensor], start: int, stop: int) -> None:
    for output, result in zip(outputs, results, strict=True):
        output[start:stop] = result


def _gather(cache: Tensor, table: Tensor, count: int) -> Tensor:
    """The first `count` rows of a sequence, [count, ...]."""
    page_size = cache.shape[1]
    pages = table[: -(-count // page_size)].long()
    return cache[pages].flatten(0, 1)[:count]


def _empty(call: TokenCall, inputs: Sequence[Tensor]) -> list[Tensor]:
    tokens = inputs[0].shape[0]
    return [inputs[0].new_zeros((tokens, *shape), dtype=dtype) for shape, dtype in call.outputs]


def _fake(inputs: Sequence[Tensor], *others: Any, **named: Any) -> list[Tensor]:
    key: str = named["key"] if "key" in named else others[-1]
    tokens = inputs[0].shape[0]
    return [
        inputs[0].new_empty((tokens, *shape), dtype=dtype) for shape, dtype in call_of(key).outputs
    ]


def _state_caches(arguments: Mapping[str, Any]) -> tuple[CacheSpec, ...]:
    call = call_of(arguments["key"])
    return tuple(CacheSpec("states", shape, dtype, "sequence") for shape, dtype in call.states)


def _all_caches(arguments: Mapping[str, Any]) -> tuple[CacheSpec, ...]:
    call = call_of(arguments["key"])
    per_token = (
        CacheSpec("token_caches", shape, dtype, "token") for shape, dtype in call.token_caches
    )
    return (*per_token, *_state_caches(arguments))


for _op in (
    token_module, sequence_module, recurrent_module, cached_sequence_module,
    cached_recurrent_module,
):  # fmt: skip
    _op.fake(_fake)
sequence_module.cached = Cached(cached_sequence_module, _all_caches)
recurrent_module.cached = Cached(cached_recurrent_module, _state_caches)
