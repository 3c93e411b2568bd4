"""Every convolution, scan and delta rule becomes one node of our state ops.

transformers keeps these token mixers as module-level functions that a model's forward looks up
by name when it runs. Each known name is replaced, in the modules that define the model's classes,
by a function that checks every argument of the call against what our op means, then calls the op
with the boundaries of the packed sequences. An argument that would change the result and that
the op does not express is an error, never dropped.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autodeploy.custom_ops.state import (
    ACTIVATIONS,
    causal_conv1d,
    gated_delta_rule,
    kimi_delta_attention,
    selective_scan,
    ssd_scan,
)

from ...errors import CaptureError
from .boundaries import current_cu_q
from .interception import Interception, interception, modeling_modules


@dataclass(frozen=True)
class Adapter:
    """How calls of one function become calls of our op."""

    run: Callable[..., Any]
    """Takes the arguments the op expresses, under the intercepted function's names."""
    absent: tuple[str, ...] = ()
    """Arguments the op does not express, declared or not: they must be None or False."""
    ignored: tuple[str, ...] = ()
    """Arguments that choose how the result is computed and not what it is."""

    @property
    def expressed(self) -> tuple[str, ...]:
        return tuple(inspect.signature(self.run).parameters)

    @property
    def required(self) -> tuple[str, ...]:
        parameters = inspect.signature(self.run).parameters.values()
        return tuple(p.name for p in parameters if p.default is inspect.Parameter.empty)


@contextmanager
def sequence_functions(model: nn.Module) -> Iterator[None]:
    """`intercept_sequence_functions` for the length of a block."""
    with interception() as scope:
        intercept_sequence_functions(scope, model)
        yield


def intercept_sequence_functions(scope: Interception, model: nn.Module) -> None:
    """Routes the sequence functions of the model's modules to our ops while `scope` is open."""
    for module in modeling_modules(model):
        for name in (*ADAPTERS, *REFUSED):
            original = vars(module).get(name)
            # Model files set the name to None where an optional package is not installed.
            if callable(original):
                where = f"{module.__name__}.{name}"
                scope.set_attribute(module, name, _replacement(name, where, original))


def _replacement(name: str, where: str, original: Callable[..., Any]) -> Callable[..., Any]:
    # Hub kernels make the function a module whose forward has the signature.
    function = original.forward if isinstance(original, nn.Module) else original
    signature = inspect.signature(function)

    @wraps(function)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        if name in REFUSED:
            raise CaptureError(f"{where} was called: {REFUSED[name]}")
        return ADAPTERS[name].run(**_checked(ADAPTERS[name], where, signature, args, kwargs))

    return replacement


def _checked(
    adapter: Adapter,
    where: str,
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """The arguments that the adapter's op expresses.

    Raises:
        CaptureError: one of the others would change the result, or one is missing.
    """
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    given: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            given.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            given.update({f"positional argument {i}": v for i, v in enumerate(value)})
        else:
            given[name] = value
    known = (*adapter.expressed, *adapter.ignored)
    for name, value in given.items():
        if name not in known and _matters(adapter, signature, name, value):
            raise CaptureError(
                f"{where} is called with '{name}', which our op does not express; dropping it "
                "would change the result, so the model needs an op that takes it"
            )
    missing = [name for name in adapter.required if given.get(name) is None]
    if missing:
        raise CaptureError(f"{where} is called without {', '.join(missing)}, which our op needs")
    batch = given[adapter.required[0]].shape[0]
    if batch != 1:
        raise CaptureError(f"{where} is called with a batch of {batch}; packed tokens have 1")
    return {name: value for name, value in given.items() if name in adapter.expressed}


def _matters(adapter: Adapter, signature: inspect.Signature, name: str, value: Any) -> bool:
    """Whether an argument that is not expressed may change the result."""
    if value is None:
        return False
    if name in adapter.absent:
        return value is not False
    if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
        return True
    if name in signature.parameters:
        return bool(value != signature.parameters[name].default)
    # Flags of the whole model that forwards pass on; transformers discards what it does not
    # declare.
    return name.startswith("positional argument")


def _causal_conv1d(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """hidden_states [1, C, T], weight [C, K] -> [1, C, T]."""
    if activation is not None and activation not in ACTIVATIONS:
        raise CaptureError(
            f"causal_conv1d_fn is called with activation '{activation}'; "
            f"our op knows {', '.join(ACTIVATIONS)}"
        )
    x = hidden_states.squeeze(0).transpose(0, 1)
    return _channels_first(causal_conv1d(x, weight, bias, current_cu_q(), activation))


def _selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """hidden_states, dt, z [1, D, T]; A [D, N]; B, C [1, N, T] -> [1, D, T]."""
    x, dt, B, C = (tensor.squeeze(0).transpose(0, 1) for tensor in (hidden_states, dt, B, C))
    gate = None if z is None else z.squeeze(0).transpose(0, 1)
    cu_q = current_cu_q()
    return _channels_first(
        selective_scan(x, dt, A, B, C, D, gate, delta_bias, cu_q, delta_softplus)
    )


def _chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] | None = None,
) -> Tensor:
    """hidden_states [1, T, H, P], dt [1, T, H], B, C [1, T, G, N] -> [1, T, H, P] float32."""
    x, dt, B, C = (tensor.squeeze(0) for tensor in (hidden_states, dt, B, C))
    low, high = (float(limit) for limit in dt_limit or (0.0, torch.inf))
    out = ssd_scan(x, dt, A, B, C, D, dt_bias, current_cu_q(), dt_softplus, low, high)
    return out.unsqueeze(0)


def _delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, None]:
    """query, key [1, T, H, Dk]; value [1, T, H, Dv]; g, beta [1, T, H] -> [1, T, H, Dv]."""
    tensors = (tensor.squeeze(0) for tensor in (query, key, value, g, beta))
    out = gated_delta_rule(*tensors, current_cu_q(), use_qk_l2norm_in_kernel)
    return out.unsqueeze(0), None


def _kimi_delta(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, None]:
    """As `_delta_rule`, with g [1, T, H, Dk]."""
    tensors = (tensor.squeeze(0) for tensor in (query, key, value, g, beta))
    out = kimi_delta_attention(*tensors, current_cu_q(), use_qk_l2norm_in_kernel)
    return out.unsqueeze(0), None


def _channels_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0)


_DELTA_ABSENT = ("initial_state", "output_final_state", "cu_seqlens", "seq_idx")
_SCAN_ABSENT = ("initial_states", "seq_idx", "cu_seqlens")

ADAPTERS: dict[str, Adapter] = {
    "causal_conv1d_fn": Adapter(
        _causal_conv1d, absent=("seq_idx", "initial_states", "return_final_states")
    ),
    "mamba_selective_scan": Adapter(
        _selective_scan,
        absent=(*_SCAN_ABSENT, "return_last_state"),
        ignored=("use_mambapy", "use_associative_scan"),
    ),
    "mamba2_chunk_scan": Adapter(
        _chunk_scan, absent=(*_SCAN_ABSENT, "z", "return_final_states"), ignored=("chunk_size",)
    ),
    "torch_chunk_gated_delta_rule": Adapter(_delta_rule, _DELTA_ABSENT, ignored=("chunk_size",)),
    "chunk_gated_delta_rule": Adapter(_delta_rule, _DELTA_ABSENT, ignored=("chunk_size",)),
    "chunk_kimi_delta_attention": Adapter(_kimi_delta, _DELTA_ABSENT, ignored=("chunk_size",)),
}
"""Intercepted functions by name."""

_TRAINING = "it is the fused form for training; call model.eval() before capture"
_DECODING = "it continues from a model's own cache; capture runs with use_cache=False"
REFUSED: dict[str, str] = {
    "mamba_inner_fn": _TRAINING,
    "mamba2_split_conv1d_scan_combined": _TRAINING,
    "causal_conv1d_update": _DECODING,
    "mamba_selective_state_update": _DECODING,
    "mamba2_selective_state_update": _DECODING,
    "torch_recurrent_gated_delta_rule": _DECODING,
    "recurrent_kimi_delta_attention": _DECODING,
}
"""Functions beside them that a capture must not reach, with the reason."""
