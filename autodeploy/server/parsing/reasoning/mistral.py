"""[THINK]...[/THINK], which are special tokens."""

from __future__ import annotations

from ..reasoning_tags import tagged

FORMAT = tagged(("[THINK]",), ("[/THINK]",), in_templates=(("[THINK]",),))
