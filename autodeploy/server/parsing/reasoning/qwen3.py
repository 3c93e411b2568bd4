"""<think>...</think>, opened by the model or by the template; what auto takes for these tags."""

from __future__ import annotations

from ..reasoning_tags import tagged

ALSO = ("glm45", "kimi_k2")
FORMAT = tagged(("<think>",), ("</think>",), in_templates=(("</think>",),))
