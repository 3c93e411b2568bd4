"""CUDA graphs of decoding steps: one launch instead of hundreds.

A graph holds for one number of sequences; a step with fewer is padded. All graphs share one pool
of memory, so the largest is captured first and the others fit into what it took.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .staging import Staging


def default_sizes(most: int) -> list[int]:
    """Numbers of sequences to capture, up to `most`, ascending.

    Close together where padding is dear: a step's time grows by whole tiles of 8 or 16 rows.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 257, 16), *range(288, most + 1, 32)]
    return sorted({size for size in sizes if size < most} | {most})


def graph_sizes(sizes: Sequence[int], most: int) -> list[int]:
    """For each number of sequences up to `most`, the size whose graph runs it; 0: none."""
    ordered = sorted(sizes)
    found = []
    for count in range(most + 1):
        at = bisect.bisect_left(ordered, count)
        found.append(ordered[at] if at < len(ordered) else 0)
    return found


@dataclass
class DecodeGraph:
    """A captured step of `size` sequences with one token each."""

    size: int
    staging: Staging
    """Its inputs; the graph reads `staging.tensors`."""
    logits: Tensor
    """[size, vocab]: what a replay leaves, shared with the graphs of other sizes."""
    pool: Any
    _graph: torch.cuda.CUDAGraph

    @classmethod
    def capture(
        cls,
        step: Callable[[], Tensor],
        size: int,
        staging: Staging,
        logits: Tensor,
        pool: Any,
    ) -> DecodeGraph:
        """Runs `step` once to compile what it needs, then records it.

        Raises:
            RuntimeError: it does something that a graph cannot hold.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            logits.copy_(step())
        return cls(size, staging, logits, graph.pool(), graph)

    def replay(self) -> None:
        """Launches it; inputs are those sent last."""
        self._graph.replay()
