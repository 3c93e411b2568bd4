"""What a checkpoint says about generating: end-of-sequence ids and sampling defaults.

As in vLLM: if the caller passes no SamplingParams, those fields of the checkpoint's
`generation_config` that differ from transformers' own defaults replace ours. `do_sample: false`
means greedy only where the file says so explicitly together with no temperature.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, GenerationConfig

from .runtime.sampling_params import SamplingParams

_log = logging.getLogger("autodeploy")

# generation_config's name -> ours
_FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True)
class GenerationDefaults:
    """Defaults of one model."""

    eos_token_ids: tuple[int, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)
    """Fields of SamplingParams that the checkpoint sets."""

    def params(self) -> SamplingParams:
        """What a request without SamplingParams gets."""
        return SamplingParams(**self.sampling)


def defaults_of(model: Any, tokenizer: Any, trust_remote_code: bool = False) -> GenerationDefaults:
    """Defaults of a live model or of a checkpoint's path or id."""
    if isinstance(model, nn.Module):
        generation, config = getattr(model, "generation_config", None), model.config
    else:
        generation, config = _read(model, trust_remote_code)
    eos: list[int] = []
    for source in (generation, config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        if value is not None:
            eos = list(value) if isinstance(value, (list, tuple)) else [value]
            break
    sampling: dict[str, Any] = {}
    stated = generation.to_diff_dict() if generation is not None else {}
    for theirs, ours in _FIELDS.items():
        if stated.get(theirs) is not None:
            sampling[ours] = stated[theirs]
    if stated.get("do_sample") is False and "temperature" not in sampling:
        sampling["temperature"] = 0.0
    if sampling.get("max_tokens", 1) < 1:
        del sampling["max_tokens"]
    defaults = GenerationDefaults(tuple(int(i) for i in eos), sampling)
    shown = ", ".join(f"{k}={v}" for k, v in sampling.items()) or "none of its own"
    _log.info("sampling defaults of the checkpoint: %s; end of sequence: %s", shown, eos)
    return defaults


def _read(path: str | Path, trust_remote_code: bool) -> tuple[Any, Any]:
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    try:
        return GenerationConfig.from_pretrained(path), config
    except OSError:
        # A checkpoint need not have one.
        return None, config
