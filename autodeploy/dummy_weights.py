"""Random weights of a checkpoint's shapes, made where they are used: for benchmarks without files.

What a model computes then means nothing; how long it takes, and how much memory, does. The class
itself draws them by its own rules (norms of one, decays in their range, projections of the
config's), once, on the device: 16 GB take well under a second on a GPU, and none of it passes
through host memory. Projections that would make their input larger are then scaled down: a deep
stack of these amplifies rounding until its logits in bfloat16 are noise (64 layers of Mamba-2, of
width 256 and a deviation of 0.32, move by 60% of their range; scaled down, by 4%).
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
            _tame(model)
    result: nn.Module = model.eval()
    return result


def _tame(model: Any) -> None:
    """Products gain at most one, and embeddings are no smaller than what layers add to them."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            _scale_down(module.weight)
        elif not isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd)):
            # Stacked projections of experts.
            for weight in module.parameters(recurse=False):
                if weight.dim() == 3:
                    _scale_down(weight)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    # A head of unit weights would make of every token its own successor.
    if head is None or head.weight is not embedding.weight:
        embedding.weight.div_(_size(embedding.weight).clamp_min(1e-3))


def _scale_down(weight: torch.Tensor) -> None:
    most = max(weight.shape[-2:]) ** -0.5
    # Without asking the device how large it is: no weight waits for the last.
    weight.mul_((most / _size(weight).clamp_min(1e-9)).clamp_max(1.0))


def _size(weight: torch.Tensor) -> torch.Tensor:
    """Root mean square of its elements, float32, on its device."""
    return torch.linalg.vector_norm(weight, dtype=torch.float32) / weight.numel() ** 0.5
