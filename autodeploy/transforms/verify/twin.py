"""The twin: a model of the same config class with one layer of each kind, in float32 on the CPU.

Checking every transform on a large model itself would cost a run of all its layers each time,
and in bfloat16 could not tell a small mistake from rounding. Layers of one kind are compiled
alike, so few of them, at their full width, with a small vocabulary, show what all would.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...errors import VerificationError

_VOCABULARY = 512


def twin_of(model: nn.Module, seed: int = 0) -> nn.Module:
    """A small float32 model of the same class: every distinct kind of layer, the same widths.

    Weights are random, scaled so that every layer changes its input by about its own size.

    Raises:
        VerificationError: the config does not say how many layers there are.
    """
    config: Any = copy.deepcopy(model.config)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = layer_list(model)
    _keep_layers(text, len(layers), layers_needed(layers))
    _shrink_vocabulary(text)
    with torch.random.fork_rng(), torch.device("cpu"):
        torch.manual_seed(seed)
        twin = type(model)(config).float().eval()
        randomise(twin)
    return twin


def stand_in(model: nn.Module) -> nn.Module:
    """A float32 model, on the same device, that is captured as `model` is: for proofs.

    Some models amplify rounding without bound: 64 random layers of a recurrence, say, whose logits
    in bfloat16 say nothing. Nothing can be compared there, and everything in this one: the twin
    or, where none can be made, the model itself in float32.
    """
    try:
        exact = twin_of(model)
    except VerificationError:
        exact = copy.deepcopy(model).float().eval()
    return exact.to(next(model.parameters()).device)


def layer_list(model: nn.Module) -> nn.ModuleList:
    """The stack of layers: the longest list of modules that is in no other list.

    Raises:
        VerificationError: there is none.
    """
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outermost = [m for name, m in lists.items() if not any(name.startswith(f"{o}.") for o in lists)]
    if not outermost:
        raise VerificationError(f"{type(model).__name__} has no list of layers to take a twin of")
    return max(outermost, key=len)


def layers_needed(layers: nn.ModuleList) -> int:
    """Length of the shortest prefix in which every distinct kind of layer occurs."""
    kinds: dict[Any, int] = {}
    for index, layer in enumerate(layers):
        kinds.setdefault(kind_of(layer), index)
    return max(kinds.values()) + 1


def kind_of(layer: nn.Module) -> Any:
    """Equal for layers that compute the same function of their weights."""

    def settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
        for name, value in sorted(vars(module).items()):
            # The place in the stack is not a kind.
            if isinstance(value, (bool, int, float, str, type(None))) and "idx" not in name:
                yield name, value

    return tuple(
        (
            name,
            type(m),
            tuple(settings(m)),
            tuple((k, p.shape) for k, p in m.named_parameters(recurse=False)),
        )
        for name, m in layer.named_modules()
    )


def _keep_layers(config: Any, total: int, keep: int) -> None:
    if keep == total:
        return
    values = config.to_dict()
    counts = [k for k, v in values.items() if v == total and type(v) is int and "layer" in k]
    if not counts:
        raise VerificationError(
            f"the config has no field that says there are {total} layers; verify on the model "
            "itself or drop 'verify'"
        )
    for name, value in values.items():
        if isinstance(value, list) and len(value) == total:
            setattr(config, name, value[:keep])
    for name in counts:
        setattr(config, name, keep)


def _shrink_vocabulary(config: Any) -> None:
    size = getattr(config, "vocab_size", None)
    if not isinstance(size, int) or size <= _VOCABULARY:
        return
    config.vocab_size = _VOCABULARY
    for name, value in config.to_dict().items():
        if name.endswith("token_id") and isinstance(value, int) and value >= _VOCABULARY:
            setattr(config, name, 0)


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights of unit gain, so that a wrong mask, position or scale shows in the logits."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            if "norm" in name or name.endswith("weight"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
        elif "embed" in name or parameter.shape[0] == _VOCABULARY:
            parameter.copy_(torch.randn_like(parameter))
        else:
            parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
