"""Random weights of a checkpoint's shapes, made where they are used: for benchmarks without files.

What a model computes then means nothing; how long it takes, and how much memory, does. The class
itself draws them by its own rules (norms of one, projections of the config's range), once, on the
device: 16 GB take well under a second on a GPU, and none of it passes through host memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SEED = 0


def dummy_model(
    config: Any, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> nn.Module:
    """A causal language model of `config` with all weights on `device`, in eval mode.

    config: of transformers; its class must have a causal language model.

    Raises:
        ValueError: it has none.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), device:
        torch.manual_seed(SEED)
        with no_init_weights():
            # torch's own values first would be written for nothing.
            model: Any = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
        with torch.no_grad():
            model.init_weights()
    result: nn.Module = model.eval()
    return result
