"""Loading a checkpoint: a directory or hub id becomes a model object that deploy owns."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .dummy_weights import dummy_model
from .errors import CheckpointError, UnsupportedModelError
from .transforms.device_copies import move_to_device

_log = logging.getLogger("autodeploy")
_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json")


def load_model(
    path: str | Path,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    load_format: str = "auto",
) -> nn.Module:
    """The causal language model of a checkpoint directory or hub id, in eval mode.

    load_format: dummy for random weights, made on the device; a directory with only a config
    will do then.

    Raises:
        CheckpointError: it is missing, has no config or no weights, or cannot be read.
        UnsupportedModelError: it holds no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    dummy = load_format == "dummy"
    _check_directory(path, weights=not dummy)
    where = f"checkpoint '{path}'"
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{where} has no readable config: {_short(error)}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{where} is an encoder-decoder: it needs an encoder input beside input_ids; "
            "deploy takes decoder-only models"
        )
    if not sys.stderr.isatty():
        disable_progress_bar()
    target = device_of(device)
    try:
        if dummy:
            return dummy_model(config, _dummy_dtype(config, dtype), target, trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
        )
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            raise UnsupportedModelError(
                f"{where} ({type(config).__name__}) has no causal language-model class in "
                "transformers: it is an encoder or another kind of model"
            ) from error
        raise CheckpointError(f"{where} cannot be loaded: {_short(error)}") from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{where} cannot be loaded: {_short(error)}") from error
    model.eval()
    return move_to_device(model, target)


def load_tokenizer(
    path: str | Path, trust_remote_code: bool = False, *, required: bool = True
) -> Any:
    """The tokenizer of a checkpoint; None if its directory has no tokenizer and none is required.

    Raises:
        CheckpointError: it cannot be read, or it is required and there is none.
    """
    folder = Path(path)
    if not required and folder.is_dir() and not any(folder.glob("*token*")):
        _log.warning("checkpoint '%s' has no tokenizer: prompts must be token ids", path)
        return None
    try:
        if _is_generic_tokenizer(folder):
            # The class AutoTokenizer would find, without 90 MB and a second of imports.
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(path)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"no tokenizer can be loaded from '{path}': {_short(error)}; pass tokenizer=..., or "
            "give prompts as token ids"
        ) from error


def _is_generic_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint says that its tokenizer is tokenizer.json and nothing more."""
    settings = folder / "tokenizer_config.json"
    if not settings.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    stated = json.loads(settings.read_text())
    return "auto_map" not in stated and stated.get("tokenizer_class") in (
        "TokenizersBackend",
        "PreTrainedTokenizerFast",
    )


def _check_directory(path: str | Path, weights: bool) -> None:
    folder = Path(path)
    if not folder.exists():
        if (
            isinstance(path, Path)
            or str(path).startswith((".", "/", "~"))
            or str(path).count("/") > 1
        ):
            raise CheckpointError(f"checkpoint directory '{path}' does not exist")
        return
    if not folder.is_dir():
        raise CheckpointError(f"'{path}' is a file; give the checkpoint's directory")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"checkpoint directory '{path}' has no config.json")
    if weights and not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        raise CheckpointError(
            f"checkpoint directory '{path}' has no weights (*.safetensors or *.bin); "
            "was the download complete? load_format='dummy' makes random ones"
        )


def device_of(name: str) -> torch.device:
    """The device that `DeployConfig.device` names; on a GPU, with its index."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        # Tensors say which one they are on, and are compared with this.
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _dummy_dtype(config: Any, asked: str) -> torch.dtype:
    stated = config.dtype or config.get_text_config().dtype
    if asked != "auto":
        stated = asked
    if isinstance(stated, str):
        stated = getattr(torch, stated)
    return stated or torch.bfloat16


def _short(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
