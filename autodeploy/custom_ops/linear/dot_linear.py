"""A product of some tokens on `dot_kernel`, and what it leaves for the norm that follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import gpu
from .add_linear_scaled import scale_of, squares_of
from .arrivals import MAX_TILES, arrivals_of
from .skinny_config import SQUARE_COLUMNS, Tiling, padded

MAX_PARTS = 64
"""Parts of a tile that can wait for each other; fewer if not a power of 2."""


@dataclass(frozen=True)
class NextNorm:
    """The norm that comes after a product, and what is left for it: see `add_linear_scaled`."""

    weight: torch.Tensor | None
    offset: float
    rounded: bool
    scaled: torch.Tensor
    """[.., columns]."""
    squares: torch.Tensor
    """[.., columns / `SQUARE_COLUMNS`, rounded up] float32."""

    @classmethod
    def of(
        cls, residual: torch.Tensor, dtype: torch.dtype, weight: torch.Tensor | None, offset: float,
        rounded: bool,
    ) -> NextNorm:  # fmt: skip
        """Room for what is left of a residual stream [.., columns]."""
        *before, columns = residual.shape
        numbers = -(-columns // SQUARE_COLUMNS)
        scaled = torch.empty(residual.shape, dtype=dtype, device=residual.device)
        squares = torch.empty((*before, numbers), dtype=torch.float32, device=residual.device)
        return cls(weight, offset, rounded, scaled, squares)

    def fill(self, stream: torch.Tensor) -> None:
        """Where the product's kernel leaves nothing itself."""
        scale = scale_of(self.weight, self.offset, self.rounded)
        wide = stream.reshape(self.scaled.shape).float()
        self.scaled.copy_(wide if scale is None else wide * scale)
        self.squares.copy_(squares_of(wide))


def can_leave(tiling: Tiling) -> bool:
    """Whether a kernel that finishes this tiling's tiles also leaves what a norm takes."""
    return tiling.kernel == "dot" and not tiling.block_n % SQUARE_COLUMNS


def dot_linear(
    operands: tuple[torch.Tensor, ...], tiling: Tiling, options: dict[str, Any],
    squares: torch.Tensor | None, eps: float, following: NextNorm | None,
) -> None:  # fmt: skip
    """operands: the first of `dot_kernel`. squares and eps: of the norm that x comes of."""
    from .dot_kernel import dot_kernel

    x, weight, *_, out = operands
    tokens, columns = out.shape
    block_m = tiling.block_m or padded(tokens)
    programs, token_tiles = -(-columns // tiling.block_n), -(-tokens // block_m)
    tiles = programs * token_tiles
    split = tiling.split if tiles <= MAX_TILES else 1
    shared = _shared(tiling, tiles, block_m)
    scratch = arrivals = out
    if split > 1:
        area = tiling.block_n * block_m * (2 if options["GATED"] else 1)
        scratch = torch.empty(tiles * split * area, dtype=torch.float32, device=x.device)
        arrivals = arrivals_of(x.device, waiting=shared)
    # Absent tensors are never read or written; any pointer stands for them.
    left = (weight, out, scratch)
    if following is not None:
        given = weight if following.weight is None else following.weight
        left = (given, following.scaled, following.squares)
    dot_kernel[(programs, split, token_tiles)](
        *operands, scratch, arrivals, scratch if squares is None else squares, *left,
        tokens, columns, eps, 0.0 if following is None else following.offset,
        K=x.shape[1], BLOCK_M=block_m, BLOCK_N=tiling.block_n, BLOCK_K=tiling.block_k, SPLIT=split,
        SHARED=shared, SQUARES=0 if squares is None else squares.shape[-1],
        COLUMNS=0 if following is None else SQUARE_COLUMNS,
        HAS_NEXT_WEIGHT=following is not None and following.weight is not None,
        HAS_OFFSET=following is not None and following.offset != 0.0,
        ROUNDED=following is not None and following.rounded,
        EARLY=early_bytes(tiling, weight, split), WIDE=gpu.interpreted(),
        num_stages=tiling.stages, **options,
    )  # fmt: skip


def _shared(tiling: Tiling, tiles: int, block_m: int) -> bool:
    """Whether each part of a tile adds up a share of it, for which parts wait for each other.

    If all programs run at a time, which one a multiprocessor does for sure. In us a layer of a
    chain of products on an H200, and what it was with one part that adds up the tile and tilings
    that differ in part: 64 tokens, 0.6B 25.1 (26.9), 1B 46.4 (46.9); 8 tokens, 0.6B 21.5 (23.1).
    """
    parts = tiling.split
    together = parts * tiles <= gpu.multiprocessors() and not gpu.interpreted()
    return together and 1 < parts <= block_m and not MAX_PARTS % parts


def early_bytes(tiling: Tiling, weight: torch.Tensor, split: int) -> int:
    """Bytes of a weight row to ask for early: none past its part's end, nor past the row's."""
    width = weight.shape[1]
    uneven = split > 1 and width % (tiling.block_k * split)
    if not gpu.overlaps_launches() or uneven or weight.data_ptr() % 16:
        return 0
    return min(tiling.early, 2 * width // split)
