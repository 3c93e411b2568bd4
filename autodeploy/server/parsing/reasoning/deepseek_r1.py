"""Text up to </think>; the opening tag may be missing everywhere."""

from __future__ import annotations

from ..reasoning_tags import tagged

ALSO = ("step3",)
FORMAT = tagged(("<think>",), ("</think>",), opened=True)
