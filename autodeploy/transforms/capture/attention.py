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
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autodeploy.custom_ops.attention import attention

from ...errors import CaptureError
from .boundaries import current_cu_q
from .interception import Interception
from .masks import Mask, classify

IMPLEMENTATION = "autodeploy"

# Arguments that models pass on and that do not change what attention computes in eval mode.
_IGNORED = frozenset(
    {"position_ids", "cache_position", "dropout", "use_cache", "output_attentions",
     "output_hidden_states", "output_router_logits", "return_dict", "position_embeddings",
     "past_key_values", "past_key_value", "num_items_in_batch", "is_causal"}
)  # fmt: skip


class MaskArgument:
    """Travels through the model in place of a mask tensor, from its maker to the attention hook.

    proved: what the mask was shown to be; None if it is no known kind.
    """

    def __init__(self, proved: Mask | None) -> None:
        self.proved = proved

    def _refuse(self, *_: Any) -> Any:
        raise CaptureError(
            "a layer uses its mask as a tensor: it has attention code of its own, which does not "
            "go through transformers' attention interface"
        )

    __add__ = __radd__ = __getitem__ = __eq__ = __ne__ = __lt__ = __invert__ = _refuse
    __mul__ = __rmul__ = __sub__ = __rsub__ = _refuse
    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse()


def intercept_attention(scope: Interception, model: nn.Module) -> None:
    """Routes the attention layers and masks of `model` to our op while `scope` is open."""
    scope.set_item(ALL_ATTENTION_FUNCTIONS._global_mapping, IMPLEMENTATION, _attend)
    scope.set_item(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, IMPLEMENTATION, _prove)
    # Both add tensors of the *input* to a mask function. Sequence boundaries are ours to apply
    # (cu_q), and packed input is never left-padded.
    scope.set_attribute(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    overlay = masking_utils.chunked_overlay
    scope.set_attribute(
        masking_utils,
        "chunked_overlay",
        lambda chunk_size, left_padding: overlay(chunk_size, _NoPadding()),
    )
    for config in configs_of(model):
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


def _prove(mask_function: Any, **_: Any) -> MaskArgument:
    return MaskArgument(classify(mask_function))


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
    mask = _mask_of(where, module, attention_mask, sliding_window)
    out = attention(
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        current_cu_q(),
        scaling if scaling is not None else query.shape[-1] ** -0.5,
        window=mask.window,
        chunk=mask.chunk,
        softcap=softcap or 0.0,
        causal=mask.causal,
        sinks=s_aux,
    )
    return out.unsqueeze(0), None


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
        kind = "an unproved mask" if isinstance(mask, MaskArgument) else "a mask tensor of its own"
        raise CaptureError(f"{where} uses {kind}: it is neither causal, sliding nor chunked")
    if not proved.causal:
        raise CaptureError(f"{where} is bidirectional: later tokens would change earlier ones")
    return proved
