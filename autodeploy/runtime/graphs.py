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
    logits: Tensor
    """[size, vocab]: what a replay leaves, until another graph is replayed."""
    pool: Any
    _graph: torch.cuda.CUDAGraph

    @classmethod
    def capture(cls, step: Callable[[], Tensor], size: int, pool: Any) -> DecodeGraph:
        """Runs `step`, which gives logits, once to compile what it needs, then records it.

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
            logits = step().contiguous()
        return cls(size, _lent(logits), graph.pool(), graph)

    def replay(self) -> None:
        """Launches it."""
        self._graph.replay()


class _Bytes:
    """Memory of a tensor, described as in the CUDA array interface."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": (tensor.numel() * tensor.element_size(),), "typestr": "|u1",
            "data": (tensor.data_ptr(), False), "strides": None, "version": 2,
        }  # fmt: skip


def _lent(tensor: Tensor) -> Tensor:
    """The same tensor, which does not keep its memory: later graphs of the pool use it as well.

    Logits of all sizes, each with memory of its own, would take half a gigabyte; and to copy them
    out of the graph took 31 us of a step of 256 sequences and 128k tokens.
    """
    data = torch.as_tensor(_Bytes(tensor), device=tensor.device)
    return data.view(tensor.dtype).view(tensor.shape)
