"""Shared experts of many tokens: two dense products, which need no sorting and no blocks.

Where products are bound by what they compute, cuBLAS does more of it in a second than a kernel that
gathers rows. Before that point the same experts are read with all others, in their launches.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import gpu

_BLOCK = 1024


def shared_products(
    x: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """residual + what `n` gated experts make of every row, weighted: [T, H].

    x [T, H], weights [T, n] in any float type, gate_up [n, 2I, H], down [n, H, I] without biases.
    Weights multiply before the second product, which sums over all n experts at once.
    """
    from ..gate.activation_kernel import gate_kernel

    tokens, hidden = x.shape
    count, _, width = down.shape
    up = (x @ gate_up.reshape(-1, hidden).T).view(tokens, count, 2 * width)
    inner = x.new_empty((tokens, count * width))
    block = min(_BLOCK, 1 << (width - 1).bit_length())
    pdl = gpu.overlaps_launches()
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    gate_kernel[(tokens * count, -(-width // block))](
        up, inner, weights, tokens * count, count, up.stride(0), up.stride(1), weights.stride(0),
        WIDTH=width, BLOCK=block, ACTIVATION=activation, SCALED=True, PDL=pdl, num_warps=4,
        **options,
    )  # fmt: skip
    # Side by side: a copy of a few megabytes, once for thousands of rows.
    side = down.movedim(0, 1).reshape(hidden, count * width).T
    return inner @ side if residual is None else torch.addmm(residual, inner, side)
