"""Placement: the part of this machine that each replica has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError


def replica_options(deploy: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Options of `deploy` for each of `count` replicas: a GPU each, or an equal share of threads.

    Raises:
        ConfigError: there are not so many GPUs, or the options leave nothing to divide.
    """
    if count == 1:
        return [dict(deploy)]
    if deploy.get("executor") == "inprocess":
        raise ConfigError(
            f"data_parallel_size={count} needs a process for each replica; leave out "
            "executor='inprocess'"
        )
    own = _gpu_each(deploy, count) if _on_gpu(deploy) else _threads_each(deploy, count)
    seed = deploy.get("seed", 0)
    # Equal prompts without a seed must not get equal answers because they met different replicas.
    return [{**deploy, **part, "seed": seed + number} for number, part in enumerate(own)]


def _on_gpu(deploy: Mapping[str, Any]) -> bool:
    device = str(deploy.get("device", "auto"))
    if device != "auto":
        return device.startswith("cuda")
    import torch

    # Asks the driver; nothing of CUDA is set up in this process.
    return torch.cuda.device_count() > 0


def _gpu_each(deploy: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    import torch

    device = str(deploy.get("device", "auto"))
    if ":" in device:
        raise ConfigError(
            f"data_parallel_size={count} gives each replica its own GPU, and device='{device}' "
            "names one for all; use device='cuda', and visible_devices to say which"
        )
    named = deploy.get("visible_devices") or os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(n) for n in range(torch.cuda.device_count())]
    if len(gpus) < count:
        raise ConfigError(
            f"data_parallel_size={count} needs as many GPUs, and {len(gpus)} can be seen"
        )
    return [{"visible_devices": gpu.strip()} for gpu in gpus[:count]]


def _threads_each(deploy: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    import torch

    threads = deploy.get("cpu_threads") or max(1, torch.get_num_threads() // count)
    return [{"cpu_threads": threads}] * count
