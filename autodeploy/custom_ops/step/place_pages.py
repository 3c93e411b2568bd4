"""place_pages: the page of every sequence's new token goes into its block table.

It is all that changes in the tables while sequences decode. Where it stands there already, it is
written once more: that is cheaper than telling the two cases apart.
"""

from __future__ import annotations

import torch

from ..op import register_op


@register_op(
    "place_pages(Tensor(a!) table, Tensor(b!) rows, Tensor pages, Tensor slots, "
    "Tensor positions, int page_size) -> Tensor",
    capturable=True,
)
def place_pages(
    table: torch.Tensor,
    rows: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    page_size: int,
) -> torch.Tensor:
    """For B sequences with one new token each, in one cache group.

    table [slots, W] int32, of all; pages [B] int32, slots [B] and positions [1, B] int64 of the
    new tokens. Leaves in rows [B, W] int32 each sequence's row of the table, up to the column of
    its new token at least; what lies behind it is no matter.

    Gives the tokens' places in the cache, [B] int64.
    """
    at = positions.view(-1)
    table.index_put_((slots, at // page_size), pages)
    rows.copy_(table.index_select(0, slots))
    return pages * page_size + at % page_size


@place_pages.fake
def _(
    table: torch.Tensor,
    rows: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    page_size: int,
) -> torch.Tensor:
    return torch.empty_like(slots)
