"""What one part of a model takes, gives and keeps, found by running the model and watching it.

The plain model runs on 5 and on 8 tokens, without a cache, and with its own cache and a few
tokens more. What has 5 in one run and 8 in the other has tokens there; what of the cache the part
changed is what it keeps, and a number that was 5 and became 8 counts tokens. Nothing is assumed
about names: a cache of transformers, a list of states and a part that keeps its past on itself
are read the same way.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import cache_utils
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from ...errors import CaptureError
from .attention import configs_of
from .interception import interception
from .object_state import Path, leaves, own_attributes

LENGTHS = (5, 8)
MORE = (3, 2)
"""Tokens of the second call of each run with a cache."""
OWN = ("own", "")
"""First step of the paths of what a part keeps on itself."""
CACHE_NAMES = ("past_key_values", "cache_params", "state")
"""The names under which transformers' models return and take their cache."""


@dataclass
class Call:
    """One call of a part of the model, as it was recorded."""

    arguments: inspect.BoundArguments
    """Copied at entry: what holds the past is as it was then."""
    own: dict[str, Any]
    """What the part kept on itself at entry."""
    before: dict[Path, Any]
    after: dict[Path, Any]
    """Leaves of everything that may hold the past, at entry and at exit."""
    output: Any


@dataclass
class Recorded:
    """Every call of one part, run by run and in order."""

    alone: tuple[list[Call], list[Call]] = field(default_factory=lambda: ([], []))
    """On `LENGTHS` tokens, without a cache."""
    first: tuple[list[Call], list[Call]] = field(default_factory=lambda: ([], []))
    """On `LENGTHS` tokens, with an empty cache."""
    more: tuple[list[Call], list[Call]] = field(default_factory=lambda: ([], []))
    """On `MORE` tokens after these."""


def record(model: nn.Module, paths: Sequence[str]) -> dict[str, Recorded]:
    """Runs the model and records every call of the parts at `paths`.

    The attention implementation is transformers' eager one, so that masks are always given.
    """
    found = {path: Recorded() for path in paths}
    with plain_model(model), _own_errors():
        for run, (length, more) in enumerate(zip(LENGTHS, MORE, strict=True)):
            ids = _some_ids(model, length + more, run)
            with _watching(model, {p: r.alone[run] for p, r in found.items()}):
                model(input_ids=ids[:, :length], use_cache=False)
            given = fresh_cache(model)
            with _watching(model, {p: r.first[run] for p, r in found.items()}):
                output = model(input_ids=ids[:, :length], use_cache=True, **given)
            name = next((n for n in CACHE_NAMES if getattr(output, n, None) is not None), None)
            past = {name: getattr(output, name)} if name else {}
            with _watching(model, {p: r.more[run] for p, r in found.items()}):
                model(input_ids=ids[:, length:], use_cache=True, **past)
    return found


def _some_ids(model: nn.Module, count: int, seed: int = 0) -> torch.Tensor:
    vocab_size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (1, count), generator=generator).to(
        next(model.parameters()).device
    )


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Whatever a model raises when it is run with a cache, as a CaptureError."""
    try:
        yield
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"the model fails with its own cache: {type(error).__name__}: {error}"
        ) from error


@contextlib.contextmanager
def plain_model(model: nn.Module, implementation: str | None = "eager") -> Iterator[None]:
    """The model in eval mode, by default with eager attention; it is as before on exit.

    implementation: of attention, under transformers' name; None: the model's own choice.
    """
    training = [m for m in model.modules() if m.training]
    with interception() as scope, torch.no_grad():
        for module in model.modules():
            scope.keep_attributes(module)
        for config in configs_of(model) if implementation else ():
            scope.set_attribute(config, "_attn_implementation_internal", implementation)
        for module in training:
            scope.set_attribute(module, "training", False)
        yield


def fresh_cache(model: nn.Module) -> dict[str, Any]:
    """An empty cache to call the model with, in which every layer keeps all tokens.

    Layers with a window throw tokens away; the mask says what may be seen, so none has to.
    """
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return {}
    config: Any = model.config
    kinds: Any = cache_utils
    made = model(input_ids=torch.zeros_like(_some_ids(model, 1)), use_cache=True)
    text: Any = config.get_text_config(decoder=True)
    plain = type(getattr(made, "past_key_values", None)) is DynamicCache
    if not plain or not hasattr(text, "num_hidden_layers"):
        # A cache of the model's own: only the model knows how to make one.
        return {}
    cache: Any = kinds.DynamicCache(config=text)
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        if type(layer) is DynamicSlidingWindowLayer:
            layers[index] = kinds.DynamicLayer()
        elif type(layer) is kinds.LinearAttentionAndSlidingWindowAttentionLayer:
            layers[index] = kinds.LinearAttentionAndFullAttentionLayer(layer.number_of_states)
    return {"past_key_values": cache}


def holders(arguments: dict[str, Any], signature: inspect.Signature) -> dict[Path, Any]:
    """Arguments that may hold the past: objects that can change, by their place."""
    found: dict[Path, Any] = {}
    for name, value in arguments.items():
        kind = signature.parameters[name].kind
        inner = value.items() if kind is inspect.Parameter.VAR_KEYWORD else ()
        for path, candidate in [
            ((("item", name),), value if not inner else None),
            *(((("item", name), ("item", key)), v) for key, v in inner),
        ]:
            if _can_hold(candidate):
                found[path] = candidate
    return found


def _can_hold(value: Any) -> bool:
    if isinstance(value, list):
        return any(isinstance(item, torch.Tensor) for item in value)
    if isinstance(value, (torch.Tensor, nn.Module, tuple, dict, str, type)) or callable(value):
        return False
    return hasattr(value, "__dict__") and not hasattr(value, "to_dict")


def past_leaves(
    arguments: dict[str, Any], own: dict[str, Any], signature: inspect.Signature
) -> dict[Path, Any]:
    """Leaves of every holder, tensors copied; paths start with the holder's place."""
    roots = {**holders(arguments, signature), (OWN,): own}
    return {
        (*place, *path): value.clone() if isinstance(value, torch.Tensor) else value
        for place, root in roots.items()
        for path, value in leaves(root).items()
    }


@contextlib.contextmanager
def _watching(model: nn.Module, calls: dict[str, list[Call]]) -> Iterator[None]:
    handles = []
    for path, into in calls.items():
        part = model.get_submodule(path)
        handles += _watch(part, into)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(part: nn.Module, into: list[Call]) -> list[Any]:
    signature = inspect.signature(part.forward)
    open_calls: list[tuple[Any, dict[str, Any], dict[Path, Any]]] = []

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        own = own_attributes(part)
        before = past_leaves(bound.arguments, own, signature)
        open_calls.append((copy.deepcopy(bound.arguments), copy.deepcopy(own), before))

    def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        arguments, own, before = open_calls.pop()
        after = past_leaves(bound.arguments, own_attributes(part), signature)
        entry = inspect.BoundArguments(signature, arguments)
        into.append(Call(entry, own, before, after, output))

    return [
        part.register_forward_pre_hook(enter, with_kwargs=True),
        part.register_forward_hook(leave, with_kwargs=True),
    ]


def keepers(model: nn.Module) -> dict[str, list[str]]:
    """Parts that keep something of the past: path -> paths of keepers inside it."""
    calls: dict[str, list[Call]] = {
        path: []
        for path, part in model.named_modules()
        if path and next(part.children(), None) is not None
    }
    with plain_model(model), _own_errors():
        given = fresh_cache(model)
        with _watching(model, calls):
            model(input_ids=_some_ids(model, LENGTHS[0]), use_cache=True, **given)
    found = [p for p, made in calls.items() if any(changed(c.before, c.after) for c in made)]
    return {p: [q for q in found if q.startswith(p + ".")] for p in found}


def changed(before: dict[Path, Any], after: dict[Path, Any]) -> list[Path]:
    """Paths of tensors that are new or have other values or shapes."""
    return [
        path
        for path, value in after.items()
        if isinstance(value, torch.Tensor) and not _same(before.get(path), value)
    ]


def _same(a: Any, b: torch.Tensor) -> bool:
    if not isinstance(a, torch.Tensor) or a.shape != b.shape or a.device != b.device:
        return False
    return bool(torch.equal(a, b))
