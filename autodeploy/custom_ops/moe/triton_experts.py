"""experts in Triton: routed on the device, so that a CUDA graph can hold it.

A token or two: every pair of a token and a choice reads its expert's weights by itself, in two
launches; the second begins to read when it knows the experts, before the first is done. More: pairs
are sorted by expert into blocks of rows, then two products over blocks and a sum over choices. The
grid is for the most blocks there could be; programs beyond the actual number end at once. Which
tiles are used depends on how many pairs a routed expert has on average. Of so many tokens that this
is bound by arithmetic, shared experts are dense products in front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import gpu
from ..op import Choice
from .experts import experts
from .gates import ACTIVATIONS
from .shared_products import shared_products
from .sorted_pairs import SortedPairs, sort_pairs

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_EXPERTS = 1024


@dataclass(frozen=True)
class RowTile:
    """Tile of the up product for single rows: columns of the result and depth of a step.

    `stages` counts where a row takes several steps.
    """

    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class DownTile:
    """Tile of the down product for single rows: numbers of weights that a program holds at once.

    early: whether the rest of its rows is asked for before it waits for the up product.
    """

    numbers: int
    warps: int
    early: bool = True


@dataclass(frozen=True)
class BlockTile:
    """Tile of one product over blocks; `group` blocks share columns of weights (see the kernel)."""

    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 1
    swap: bool = False


@dataclass(frozen=True)
class Tiles:
    """Both products while an expert has at most `pairs_per_expert` pairs on average."""

    pairs_per_expert: float
    rows: int
    """Rows of a block: both products share the blocks."""
    up: BlockTile
    down: BlockTile


# While more than EXPERTS_PER_PAIR experts share a pair, two pairs seldom have the same one.
EXPERTS_PER_PAIR = 4
# Numbers of a row that a program of the up product reads at once; longer rows take steps.
WHOLE_ROW = 4096
ROW_UP, ROW_DOWN = RowTile(4, 256, 2, 6), DownTile(4096, 8, early=False)
# Of more than 8 choices, which leave much of a tile empty. Both products of one token in us on an
# H200: 9 of 256 x 1024 8.6 (9.7), 11 of 512 x 2048 26.3 (27.7).
MANY_ROW_DOWN = DownTile(2048, 4, early=False)
TILES = (
    Tiles(8, 16, BlockTile(64, 128, 4, 3, 1, True), BlockTile(128, 128, 4, 3, 1, True)),
    Tiles(24, 32, BlockTile(64, 128, 4, 3), BlockTile(128, 128, 4, 3)),
    Tiles(64, 64, BlockTile(128, 64, 4, 3, 4), BlockTile(256, 64, 8, 3, 4)),
    Tiles(float("inf"), 128, BlockTile(128, 64, 8, 4, 8), BlockTile(256, 64, 8, 4, 8)),
)
"""Untransposed weights; a gated product's tile has twice `columns` rows of weights."""
HALVED_ROWS = 128
"""From this many rows on, half a block is computed where that is all it has. Of 8192 tokens and
their 8 of 128 experts one row in nine is of no pair, with halves one in eighteen."""


def _applies(choice: Choice) -> bool:
    if not gpu.runs_triton(choice.device):
        return False
    a = choice.args
    x, gate_up, down, weights = (a[n] for n in ("x", "gate_up", "down", "top_k_weights"))
    biases = [b for b in (a["gate_up_bias"], a["down_bias"]) if b is not None]
    return (
        x.dim() == 2
        and x.dtype in _DTYPES
        and gate_up.dtype is x.dtype
        and down.dtype is x.dtype
        and all(t.dtype in _DTYPES for t in (weights, *biases))
        and a["activation"] in ACTIVATIONS
        and isinstance(gate_up.shape[0], int)
        and gate_up.shape[0] <= _MAX_EXPERTS
    )


@experts.implement("triton", when=_applies, priority=10, capturable=True)
def grouped(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    limit: float = 0.0,
    alpha: float = 0.0,
    shared: int = 0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `experts`; x and the weights of one dtype, at most 1024 experts."""
    tokens, choices = top_k_index.shape
    if tokens * choices == 0:
        return x.new_zeros(x.shape) if residual is None else residual.clone()
    if residual is not None:
        residual = residual.contiguous()
    if not transposed:
        gate_up, down = gate_up.mT, down.mT
    up = _Product(gate_up, gate_up_bias, activation, gated, interleaved, limit, alpha)
    back = _Product(down, down_bias)
    x = x if x.stride(1) == 1 else x.contiguous()
    index, weights = top_k_index.contiguous(), top_k_weights.contiguous()
    # Whether pairs meet is asked of routed ones: those of shared experts do, whatever the rest.
    pairs, total = tokens * (choices - shared), gate_up.shape[0] - shared
    if tokens == 1 or pairs * EXPERTS_PER_PAIR <= total:
        return by_row(x, index, weights, up, back, residual, shared=shared)
    tiles = next(t for t in TILES if pairs <= t.pairs_per_expert * total)
    biased = gate_up_bias is not None or down_bias is not None
    plain = gated and not (biased or interleaved or transposed or limit or alpha)
    # In the last tiles blocks are bound by what they compute.
    if shared and plain and tiles is TILES[-1]:
        alone = (weights[:, :shared], gate_up[:shared].mT, down[:shared].mT)
        residual = shared_products(x, *alone, activation, residual)
        index, weights = index[:, shared:].contiguous(), weights[:, shared:].contiguous()
    return by_block(x, index, weights, up, back, tiles, residual)


class _Product:
    """One of the two products, as kernels take it."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str = "",
        gated: bool = False,
        interleaved: bool = False,
        limit: float = 0.0,
        alpha: float = 0.0,
    ) -> None:
        """weight [E, width, columns or 2 * columns], bias [E, columns or 2 * columns]."""
        self.weight = weight
        self.bias = weight if bias is None else bias.contiguous()
        # Of an expert, of a row, which is a column of the result, and of a step in depth.
        self.strides = (weight.stride(0), weight.stride(2), weight.stride(1))
        self.experts, width, columns = weight.shape
        self.columns = columns // 2 if gated else columns
        self.plain: dict[str, Any] = {
            "WIDTH": width, "COLUMNS": self.columns, "HAS_BIAS": bias is not None,
            "PDL": gpu.overlaps_launches(),
        }  # fmt: skip
        self.form: dict[str, Any] = {
            "GATED": gated, "INTERLEAVED": interleaved,
            "PAIRED": interleaved or self.strides[2] == 1, "ACTIVATION": activation,
            "LIMIT": limit, "ALPHA": alpha, **self.plain,
        }  # fmt: skip

    def depth(self, wanted: int) -> int:
        """Depth of a step: in bytes as measured for 16-bit numbers, and no more than there is."""
        width = self.plain["WIDTH"]
        wanted = wanted * 2 // self.weight.element_size()
        return max(16, min(wanted, 1 << (width - 1).bit_length()))

    def early(self, wanted: int) -> int:
        """Bytes of a row to ask for before the wait: of rows of 2-byte numbers without gaps."""
        width = self.plain["WIDTH"]
        whole = self.strides[1:] == (width, 1) and width % 8 == 0
        if not whole or self.weight.element_size() != 2 or self.form["GATED"]:
            return 0
        return min(wanted, 2 * width) if self.weight.data_ptr() % 16 == 0 else 0


def by_row(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    up: _Product,
    down: _Product,
    residual: torch.Tensor | None = None,
    up_tile: RowTile | None = None,
    down_tile: DownTile | None = None,
    shared: int = 0,
) -> torch.Tensor:
    """Every pair by itself."""
    from .row_kernel import row_down_kernel, row_up_kernel

    tokens, choices = index.shape
    options: dict[str, Any] = {"launch_pdl": True} if gpu.overlaps_launches() else {}
    counts = {"EXPERTS": up.experts, "CHOICES": choices}
    inner = x.new_empty((tokens * choices, up.columns))
    out = x.new_empty(x.shape)
    tile = up_tile or _up_tile(up)
    row_up_kernel[(-(-up.columns // tile.columns), tokens * choices)](
        x, index, up.weight, up.bias, inner, x.stride(0), *up.strides, **up.form, **counts,
        SHARED=shared, BLOCK_N=tile.columns, BLOCK_K=tile.depth, STAGES=tile.stages,
        num_warps=tile.warps, **options,
    )  # fmt: skip
    down_tile = down_tile or (ROW_DOWN if choices <= 8 else MANY_ROW_DOWN)
    columns, depth = _beside(down, down_tile, choices)
    early = down.early(2 * down.plain["WIDTH"]) if down_tile.early and options else 0
    row_down_kernel[(-(-down.columns // columns), tokens)](
        inner, index, weights, down.weight, down.bias, out if residual is None else residual, out,
        *down.strides, **down.plain, **counts, HAS_RESIDUAL=residual is not None,
        BLOCK_C=1 << (choices - 1).bit_length(), BLOCK_N=columns, BLOCK_K=depth,
        EARLY=max(0, early - 2 * depth), num_warps=down_tile.warps, **options,
    )  # fmt: skip
    return out


def _up_tile(up: _Product) -> RowTile:
    """Whole rows at once, if they fit; the long side lies along what memory holds together."""
    if up.strides[2] != 1:
        return RowTile(64, 32, ROW_UP.warps, ROW_UP.stages)
    whole = up.depth(1 << 30)
    if whole <= WHOLE_ROW:
        return RowTile(WHOLE_ROW // whole, whole, 4, 1)
    return RowTile(ROW_UP.columns, up.depth(ROW_UP.depth), ROW_UP.warps, ROW_UP.stages)


def _beside(down: _Product, tile: DownTile, choices: int) -> tuple[int, int]:
    """Columns and depth of a step of the down product, which reads all choices side by side."""
    room = max(16, tile.numbers >> (choices - 1).bit_length())
    if down.strides[2] != 1:
        # Columns lie together: as few as a piece of memory has, for more programs.
        columns = min(32, room)
        return columns, max(1, min(64, room // columns))
    width = down.plain["WIDTH"]
    depth = min(room, down.depth(room))
    # Whole rows at once, if they fit; if not, no step past their end.
    while 128 < depth < width and width % depth:
        depth //= 2
    return max(1, room // depth), depth


def by_block(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    up: _Product,
    down: _Product,
    tiles: Tiles,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Pairs sorted by expert."""
    from .experts_kernel import sum_choices_kernel

    tokens, choices = index.shape
    pairs = tokens * choices
    order = sort_pairs(index, up.experts, tiles.rows)
    inner = x.new_empty((pairs, up.columns))
    hidden = x.new_empty((pairs, down.columns))
    out = x.new_empty(x.shape)
    _block_product(x, up, inner, order, choices, tiles.up, known=False)
    _block_product(inner, down, hidden, order, 1, tiles.down, known=True)
    pdl = gpu.overlaps_launches()
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    # All choices of a column are held at once.
    room = max(256, 8192 >> (choices - 1).bit_length())
    block = min(1024, room, 1 << (down.columns - 1).bit_length())
    sum_choices_kernel[(tokens, -(-down.columns // block))](
        hidden, index, weights, out if residual is None else residual, out, WIDTH=down.columns,
        EXPERTS=up.experts, CHOICES=choices, HAS_RESIDUAL=residual is not None,
        BLOCK_C=1 << (choices - 1).bit_length(), BLOCK=block, PDL=pdl, num_warps=4, **options,
    )  # fmt: skip
    return out


def _block_product(
    x: torch.Tensor, product: _Product, out: torch.Tensor, order: SortedPairs, choices: int,
    tile: BlockTile, known: bool,
) -> None:  # fmt: skip
    from .experts_kernel import block_product_kernel

    options: dict[str, Any] = {"launch_pdl": True} if gpu.overlaps_launches() else {}
    grid = order.max_blocks * -(-product.columns // tile.columns)
    depth = product.depth(tile.depth)
    # Larger blocks are bound by what they compute.
    early = product.early(2 * depth * tile.stages) if known and order.rows <= 32 else 0
    block_product_kernel[(grid,)](
        x, product.weight, product.bias, out, order.slots, order.block_expert, order.block_count,
        out.shape[0], product.plain["WIDTH"], x.stride(0), *product.strides, **product.form,
        CHOICES=choices, BLOCK_M=order.rows, BLOCK_N=tile.columns, BLOCK_K=depth, GROUP=tile.group,
        SWAP=tile.swap, HALVES=order.rows >= HALVED_ROWS, KNOWN=known, EARLY=early,
        num_warps=tile.warps, num_stages=tile.stages,
        **options,
    )  # fmt: skip
