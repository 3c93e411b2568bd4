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

from torch import nn

from ..checkpoint import load_model
from ..cli.options import deploy_options
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
        return deploy(dummy_checkpoint(self.dummy), **{**self.options, "load_format": "dummy"})

    def live_model(self) -> nn.Module:
        """The plain model on its device, as transformers makes it."""
        return load_model(
            self.model or dummy_checkpoint(self.dummy),
            self.options.get("dtype", "auto"),
            self.options.get("device", "auto"),
            bool(self.options.get("trust_remote_code")),
            "auto" if self.model else "dummy",
        )


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
