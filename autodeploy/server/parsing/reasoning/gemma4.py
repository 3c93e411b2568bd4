"""<|channel>thought and the reasoning, up to <channel|>."""

from __future__ import annotations

from ..reasoning_tags import tagged

FORMAT = tagged(
    ("<|channel>thought",), ("<channel|>",), in_templates=(("<|channel>", "<channel|>"),)
)
