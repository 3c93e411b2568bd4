"""What a benchmark runs on: a checkpoint or random weights, deployed once for all kinds."""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import load_model
from ..cli.options import deploy_options
from ..config import DeployConfig
from ..deployment import deploy
from ..llm import LLM
from .shapes import dummy_checkpoint

DEFAULT_SHAPE = "llama-101m"


@dataclasses.dataclass(frozen=True)
class Target:
    """Which model, and how it is deployed; all of it can be written as JSON."""

    model: str | None
    """A checkpoint; None: random weights."""
    dummy: str
    """A shape or config to give random weights; see `dummy_checkpoint`."""
    seed: int
    """Of random weights."""
    options: dict[str, Any]
    """For `deploy`. Without a word of it there is no prefix cache: repeats would find prompts."""

    @classmethod
    def of(cls, args: argparse.Namespace) -> Target:
        options = {"enable_prefix_caching": False, **deploy_options(args)}
        return cls(args.model, args.dummy or DEFAULT_SHAPE, args.seed, options)

    @property
    def name(self) -> str:
        return self.model or f"{self.dummy} (random weights)"

    def deploy(self) -> LLM:
        """The model, ready to serve."""
        if self.model is not None:
            return deploy(self.model, **self.options)
        if "load_format" in {field.name for field in dataclasses.fields(DeployConfig)}:
            options = {**self.options, "load_format": "dummy"}
            return deploy(dummy_checkpoint(self.dummy), **options)
        return deploy(self.live_model(), **self._for_live_model())

    def live_model(self) -> nn.Module:
        """The plain model on its device, as transformers makes it."""
        dtype = self.options.get("dtype", "auto")
        device = self.options.get("device", "auto")
        if self.model is not None:
            trusted = bool(self.options.get("trust_remote_code"))
            return load_model(self.model, dtype, device, trust_remote_code=trusted)
        return random_model(dummy_checkpoint(self.dummy), dtype, device, self.seed)

    def _for_live_model(self) -> dict[str, Any]:
        return {k: v for k, v in self.options.items() if k not in ("dtype", "device")}


def random_model(folder: Path, dtype: str, device: str, seed: int) -> nn.Module:
    """A model of a config with transformers' own random weights, made on its device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    stated = getattr(config, "dtype", None) or torch.float32
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    with torch.device(device):
        kind = stated if dtype == "auto" else getattr(torch, dtype)
        return AutoModelForCausalLM.from_config(config, dtype=kind).eval()


@contextmanager
def deployed(target: Target) -> Iterator[tuple[LLM, dict[str, float]]]:
    """The model, and seconds: of `deploy`, and since this process began."""
    started = time.perf_counter()
    with target.deploy() as llm:
        ready = {"deploy": time.perf_counter() - started, "process": process_seconds()}
        yield llm, ready


def process_seconds() -> float:
    """Seconds since this process began, imports included (Linux)."""
    # Fields follow the command's name in parentheses; the 22nd is the start, in clock ticks.
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    began = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text().split()[0]) - began
