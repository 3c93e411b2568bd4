"""Match counts: how many sites each step of a recipe rewrote, as one fact of an engine's summary.

Facts are text, because they are kept beside a program and cross process boundaries; both
directions are here, so that whoever shows the counts need not know how they are written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping


def match_counts_text(counts: Mapping[str, int]) -> str:
    """'canonicalize 3, cache 8' for {'canonicalize': 3, 'cache': 8}; order is the recipe's."""
    return ", ".join(f"{step} {matches}" for step, matches in counts.items())


def read_match_counts(summary: Mapping[str, str]) -> dict[str, int]:
    """Matches by step id, in the recipe's order; empty if no recipe ran (rung 3)."""
    entries = _ENTRY.findall(summary.get("transforms", ""))
    return {step: int(matches) for step, matches in entries}


_ENTRY = re.compile(r"(.+?) (\d+)(?:, |$)")
