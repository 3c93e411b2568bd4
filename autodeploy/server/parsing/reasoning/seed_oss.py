"""<seed:think>...</seed:think>."""

from __future__ import annotations

from ..reasoning_tags import tagged

FORMAT = tagged(("<seed:think>",), ("</seed:think>",), in_templates=(("<seed:think>",),))
