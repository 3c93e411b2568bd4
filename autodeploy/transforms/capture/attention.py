"""Every attention layer becomes one `autodeploy::attention` node.

transformers dispatches attention and its masks through two registries by the config's
implementation name. We register one function in each under our own name: the mask function
returns the *proved* mask instead of a tensor, and the attention function receives it with the
query, key and value of its layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autodeploy.custom_ops.attention import attention, packed_mask

from ...errors import CaptureError
from .boundaries import current_cu_q
from .interception import Interception
from .masks import Mask, MaskFunction, classify

IMPLEMENTATION = "autodeploy"

# Arguments that models pass on and that do not change what attention computes in eval mode.
_IGNORED = frozenset(
    {"position_ids", "cache_position", "dropout", "use_cache", "output_attentions",
     "output_hidden_states", "output_router_logits", "return_dict", "position_embeddings",
     "past_key_values", "past_key_value", "num_items_in_batch", "is_causal", "logits_to_keep"}
)  # fmt: skip


class MaskArgument:
    """Travels through the model in place of a mask tensor, from its maker to the attention hook.

    A layer that uses it as a tensor, because its attention code is its own, gets the output of a
    `packed_mask` node, from which `own_attention` later recognises what the layer computes.

    function: says whether a key is seen, of (batch, head, query, key). tokens: T, as many queries
    as keys. dtype: bool, or the one in which the mask is added.
    """

    def __init__(self, function: MaskFunction, tokens: Any, dtype: torch.dtype) -> None:
        self.proved = classify(function)
        """What the mask was shown to be; None if it is no known kind on its own."""
        self._function = function
        self._tokens = tokens
        self._dtype = dtype
        self._tensor: torch.Tensor | None = None

    def as_tensor(self) -> torch.Tensor:
        """The mask as a tensor [1, 1, T, T]; one node however often it is used."""
        if self._tensor is None:
            proved = self.proved
            if proved is None:
                self._tensor = self._computed()
            else:
                self._tensor = packed_mask(
                    current_cu_q(), self._tokens, self._dtype,
                    proved.window, proved.chunk, proved.causal,
                )  # fmt: skip
        return self._tensor

    def _computed(self) -> torch.Tensor:
        """The mask's function, recorded: it may use tensors that have values in the graph only.

        Right for one sequence; what it masks there is told later, with the attention it is in.
        """
        row = torch.arange(self._tokens, device=current_cu_q().device)
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=row.device)
        seen = self._function(zero, zero, row[None, None, :, None], row[None, None, None, :])
        if self._dtype is torch.bool:
            return seen
        hidden = torch.finfo(self._dtype).min
        return torch.zeros_like(seen, dtype=self._dtype).masked_fill(~seen, hidden)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(MaskArgument, MaskArgument.as_tensor, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.as_tensor(), name)

    __hash__ = object.__hash__


def _on_tensor(name: str) -> Any:
    def method(self: MaskArgument, *args: Any) -> Any:
        return getattr(self.as_tensor(), name)(*args)

    return method


# Python looks operators up on the class, past __getattr__.
for _name in (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "and", "rand", "or", "ror",
    "eq", "ne", "lt", "le", "gt", "ge", "neg", "invert", "getitem", "len",
):  # fmt: skip
    setattr(MaskArgument, f"__{_name}__", _on_tensor(f"__{_name}__"))


def intercept_attention(scope: Interception, model: nn.Module, configured: bool = False) -> None:
    """Routes the attention layers and masks of `model` to our op while `scope` is open.

    configured: under the name of the attention that each config states, so that code that asks
    for that name finds it; else under a name of our own.
    """
    names = {IMPLEMENTATION}
    if configured:
        names = {config._attn_implementation for config in configs_of(model)} - {None}
    for name in names:
        scope.set_item(ALL_ATTENTION_FUNCTIONS._global_mapping, name, _attend)
        prove = _prove_for_sdpa if name == "sdpa" else _prove
        scope.set_item(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, name, prove)
    # Both add tensors of the *input* to a mask function. Sequence boundaries are ours to apply
    # (cu_q), and packed input is never left-padded.
    scope.set_attribute(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    overlay = masking_utils.chunked_overlay
    scope.set_attribute(
        masking_utils,
        "chunked_overlay",
        lambda chunk_size, left_padding: overlay(chunk_size, _NoPadding()),
    )
    for config in () if configured else configs_of(model):
        scope.set_attribute(config, "_attn_implementation_internal", IMPLEMENTATION)


class _NoPadding:
    def __getitem__(self, index: Any) -> int:
        return 0


def configs_of(model: nn.Module) -> list[Any]:
    """Every distinct config object of a model and its parts, sub-configs included."""
    found: dict[int, Any] = {}

    def visit(config: Any) -> None:
        if config is None or id(config) in found or not hasattr(config, "to_dict"):
            return
        found[id(config)] = config
        for name in getattr(config, "sub_configs", {}) or {}:
            visit(getattr(config, name, None))

    for part in model.modules():
        visit(getattr(part, "config", None))
    return list(found.values())


def _prove(
    mask_function: Any, q_length: Any, kv_length: Any, dtype: torch.dtype = torch.float32, **_: Any
) -> MaskArgument:
    if q_length is not kv_length and q_length != kv_length:
        raise CaptureError(f"a mask has {q_length} queries and {kv_length} keys")
    return MaskArgument(mask_function, q_length, dtype)


def _prove_for_sdpa(mask_function: Any, q_length: Any, kv_length: Any, **_: Any) -> MaskArgument:
    """As `_prove`, in the format of torch's own attention."""
    return _prove(mask_function, q_length, kv_length, torch.bool)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *positional: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """q [1, Hq, T, D], k [1, Hkv, T, D], v [1, Hkv, T, Dv] -> [1, T, Hq, Dv]."""
    where = f"attention of {type(module).__name__} (layer {getattr(module, 'layer_idx', '?')})"
    if positional:
        raise CaptureError(f"{where} is called with {len(positional)} unknown positional arguments")
    _refuse_unknown(where, others)
    scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
    if isinstance(attention_mask, MaskArgument) and attention_mask.proved is None:
        attention_mask = attention_mask.as_tensor()
    if isinstance(attention_mask, torch.Tensor):
        if s_aux is not None:
            raise CaptureError(f"{where} has sinks and a mask tensor of its own")
        return _spelled_out(query, key, value, attention_mask, scaling, softcap), None
    mask = _mask_of(where, module, attention_mask, sliding_window)
    out = attention(
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        current_cu_q(),
        scaling,
        window=mask.window,
        chunk=mask.chunk,
        softcap=softcap or 0.0,
        causal=mask.causal,
        sinks=s_aux,
    )
    return out.unsqueeze(0), None


def _spelled_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor,
    scaling: float, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """Attention in plain operations, for a mask that only the whole graph tells."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask.dtype is torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2)


def _refuse_unknown(where: str, arguments: dict[str, Any]) -> None:
    unknown = [
        name
        for name, value in arguments.items()
        if name not in _IGNORED and value is not None and value is not False
        and isinstance(value, (torch.Tensor, float, int, Iterable)) and not isinstance(value, str)
    ]  # fmt: skip
    if unknown:
        raise CaptureError(
            f"{where} is called with {', '.join(sorted(unknown))}, which the attention op does "
            "not express; dropping it would change the result"
        )


def _mask_of(where: str, module: nn.Module, mask: Any, sliding_window: int | None) -> Mask:
    if isinstance(mask, MaskArgument) and mask.proved is not None:
        proved = mask.proved
    elif mask is None:
        # No mask was made for this layer: transformers then takes plain causal attention.
        if getattr(module, "is_causal", None) is False:
            raise CaptureError(f"{where} has no mask and says it is not causal")
        proved = Mask(window=sliding_window or 0)
    else:
        raise CaptureError(f"{where} has a mask of kind {type(mask).__name__}, not a tensor")
    if not proved.causal:
        raise CaptureError(f"{where} is bidirectional: later tokens would change earlier ones")
    return proved
