"""<think>...</think>, opened by the template when the request asks for it."""

from __future__ import annotations

from ..reasoning_tags import tagged

FORMAT = tagged(("<think>",), ("</think>",))
