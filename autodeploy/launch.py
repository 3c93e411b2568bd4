"""Starting an engine where the config wants it: in this process, or in a worker process."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import nn

from .build import build_engine
from .config import DeployConfig
from .errors import ConfigError
from .runtime.executor import Executor, start_executor


def build_executor(config: DeployConfig) -> Executor:
    """Starts an engine for `config`.

    Raises:
        ConfigError: before anything is loaded.
        ModelError: the model cannot be loaded or served.
    """
    if not isinstance(config.model, (nn.Module, str, Path)):
        raise ConfigError(
            "model must be a live model, a checkpoint directory or a hub id, not "
            f"{type(config.model).__name__}"
        )
    config.resolved_recipe()
    if isinstance(config.model, nn.Module):
        from .transforms.capture.export import check_causal

        check_causal(config.model)
    return start_executor(config.executor, partial(build_engine, config))
