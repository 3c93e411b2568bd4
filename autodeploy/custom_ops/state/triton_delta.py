"""cached_gated_delta_rule and cached_kimi_delta_attention in Triton."""

from __future__ import annotations

from torch import Tensor

from .. import gpu
from ..op import Choice
from .delta_rule import cached_gated_delta_rule, cached_kimi_delta_attention
from .packed import FLOATS, check_rows, launch_options, new_output, power_of_two, whole_rows

# Numbers of the state that one program holds.
_TILE = 4096


def _applies(choice: Choice) -> bool:
    if not gpu.runs_triton(choice.device):
        return False
    dtypes = {choice.args[name].dtype for name in ("q", "k", "v", "g", "beta")}
    return dtypes <= set(FLOATS) and int(choice.args["k"].shape[-1]) <= 512


@cached_gated_delta_rule.implement("triton", when=_applies, priority=10, capturable=True)
@cached_kimi_delta_attention.implement("triton", when=_applies, priority=10, capturable=True)
def mix_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    delta_state: Tensor,
    cu_q: Tensor,
    kv_len: Tensor,
    state_slot: Tensor,
    qk_l2norm: bool = False,
    tile: int = _TILE,
    num_warps: int = 4,
) -> Tensor:
    """As `cached_gated_delta_rule`, g [T, H] or [T, H, Dk]; Dk at most 512."""
    from .delta_kernel import delta_step_kernel

    tokens, heads, values = v.shape
    sequences, (groups, keys) = len(state_slot), k.shape[1:]
    q, k, v, g, beta = (whole_rows(tensor) for tensor in (q, k, v, g, beta))
    state = check_rows(delta_state)
    out = new_output(v, (tokens, heads, values), q.dtype, sequences)
    block_keys = power_of_two(keys)
    block = min(power_of_two(values), max(8, tile // block_keys))
    delta_step_kernel[(heads * -(-values // block), sequences)](
        q, k, v, g, beta, state, cu_q, kv_len, state_slot, out, sequences, q.stride(0),
        k.stride(0), v.stride(0), g.stride(0), beta.stride(0), state.stride(0), keys**-0.5,
        HEADS=heads, GROUPS=groups, KEYS=keys, VALUES=values, BLOCK_KEYS=block_keys, BLOCK=block,
        PER_CHANNEL=g.dim() == 3, NORMALIZE=qk_l2norm, FILL=tokens == sequences,
        num_warps=num_warps, **launch_options(),
    )  # fmt: skip
    return out
