"""What a checkpoint says about generating: end-of-sequence ids and sampling defaults.

As in vLLM: if the caller passes no SamplingParams, those fields of the checkpoint's
`generation_config` that differ from transformers' own defaults replace ours. `do_sample: false`
means greedy only where the file says so explicitly together with no temperature.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .errors import CheckpointError, SamplingParamsError
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
    """Defaults of a live model or of a checkpoint's path or id.

    Raises:
        CheckpointError: a file that states them cannot be read.
    """
    if isinstance(model, nn.Module):
        generation = getattr(model, "generation_config", None)
        stated = generation.to_diff_dict() if generation is not None else {}
        live: Any = model
        config = live.config.to_dict()
    else:
        stated, config = _read(Path(model), trust_remote_code)
    eos = _eos_token_ids(stated, config, tokenizer)
    sampling: dict[str, Any] = {}
    for theirs, ours in _FIELDS.items():
        if stated.get(theirs) is not None:
            sampling[ours] = stated[theirs]
    if stated.get("do_sample") is False and "temperature" not in sampling:
        sampling["temperature"] = 0.0
    sampling = {name: value for name, value in sampling.items() if _is_usable(name, value)}
    defaults = GenerationDefaults(eos, sampling)
    shown = ", ".join(f"{k}={v}" for k, v in sampling.items()) or "none of its own"
    _log.info("sampling defaults of the checkpoint: %s; end of sequence: %s", shown, eos)
    return defaults


def _is_usable(name: str, value: Any) -> bool:
    """Whether a request can have it; a default that none can have is named and left out."""
    try:
        SamplingParams(**{name: value})
    except SamplingParamsError as error:
        _log.warning("a default of the generation_config is left out: %s", error)
        return False
    return True


def _eos_token_ids(
    generation: dict[str, Any], config: dict[str, Any], tokenizer: Any
) -> tuple[int, ...]:
    """The first that says something: generation_config, config, tokenizer."""
    sources = (generation.get("eos_token_id"), config.get("eos_token_id"))
    for value in (*sources, getattr(tokenizer, "eos_token_id", None)):
        if value is not None:
            ids = tuple(value) if isinstance(value, (list, tuple)) else (value,)
            if all(type(i) is int for i in ids):
                return ids
            raise CheckpointError(f"eos_token_id must be one token id or a list, not {value!r:.60}")
    return ()


def _read(path: Path, trust_remote_code: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """What generation_config and config of a checkpoint state."""
    if path.is_dir():
        # The files are plain JSON, and transformers' classes take a second to import.
        files = (path / "generation_config.json", path / "config.json")
        generation, config = (_read_json(f) if f.is_file() else {} for f in files)
        return generation, config
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code).to_dict()
    try:
        return GenerationConfig.from_pretrained(str(path)).to_diff_dict(), config
    except OSError:
        # A checkpoint need not have one.
        return {}, config


def _read_json(file: Path) -> dict[str, Any]:
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{file}' cannot be read: {error}; correct or delete it") from error
    if not isinstance(stated, dict):
        raise CheckpointError(f"'{file}' holds no JSON object; correct or delete it")
    return stated
