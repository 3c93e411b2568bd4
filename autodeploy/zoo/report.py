"""What a zoo run found, as JSON, as a page to read, and as a comparison with an earlier run."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .architectures import DECODERS
from .measure import Record

FORMAT = 1


def to_json(records: Iterable[Record], versions: Mapping[str, str]) -> str:
    """The whole run; `from_json` reads it back."""
    data = {
        "format": FORMAT,
        "versions": dict(versions),
        "records": [dataclasses.asdict(record) for record in records],
    }
    return json.dumps(data, indent=1) + "\n"


def from_json(path: Path) -> tuple[dict[str, Record], dict[str, str]]:
    """Records by name, and the versions they were measured with.

    Raises:
        ValueError: the file is no zoo run of this format.
    """
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"'{path}' is no result of `autodeploy zoo --json` of this version")
    return {r["name"]: Record(**r) for r in data["records"]}, data["versions"]


def versions() -> dict[str, str]:
    """What decides a result."""
    import torch
    import transformers

    from autodeploy import __version__

    return {
        "autodeploy": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def groups(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records under the headings of the page."""
    found: dict[str, list[Record]] = {"Decoder language models": [], "Others": []}
    for record in records:
        heading = "Decoder language models" if record.name in DECODERS else "Others"
        found[heading].append(record)
    return {heading: members for heading, members in found.items() if members}


def summary(records: Iterable[Record]) -> str:
    """Counts of outcomes, as one line."""
    counts = Counter(record.outcome for record in records)
    order = sorted(counts, key=lambda name: (not name.startswith("rung"), name))
    return ", ".join(f"{counts[name]} {name}" for name in order)


def markdown(records: list[Record], measured: Mapping[str, str], seconds: float) -> str:
    """The page: counts, a table for each group, and every cause below the top rung."""
    tools = ", ".join(f"{name} {version}" for name, version in measured.items())
    parts = [_HEAD.format(tools=tools, minutes=seconds / 60, count=len(records))]
    for heading, members in groups(records).items():
        parts.append(f"## {heading}\n\n{len(members)}: {summary(members)}.\n")
        parts.append(_table(members))
        causes = [r for r in members if r.cause]
        if causes:
            parts.append("### Why\n")
            parts += [f"- **{r.name}** ({r.outcome}): {_cell(r.cause)}" for r in causes]
            parts.append("")
    return "\n".join(parts)


_HEAD = """\
# The zoo

Every architecture that transformers maps to a causal language model, deployed as a tiny random
model with every kind of layer it has, and compared with the plain model. Written by

    autodeploy zoo --markdown docs/zoo.md --json docs/zoo.json

with {tools}, in {minutes:.0f} minutes for {count} architectures.

**Rung 1** is packed and cached: all sequences of a step side by side in one graph, over paged
caches. **Rung 2** calls the model for one sequence at a time, with the model's own cache; **rung
3** does so without a cache. A model is *exact* if every greedy token is the plain model's choice
and its log probability the same within 1e-3, for 12 ragged requests with prompts in chunks of 7
tokens, pages of 4, shared prefixes and preemption, and, on rung 1, if all logits are the same
within 1e-4 of their range. The plain model runs without a cache, with its own choice of attention
or, where that is not causal, with eager attention. *No model*: transformers makes none of the
default config, or none that takes text alone.

*Own code* counts parts of the model that no op of ours expresses and that run as the model's own
code inside the graph: exact, and slow. *Unrecognised* counts other operations beyond products,
arithmetic by element and views.
"""


def _table(records: Iterable[Record]) -> str:
    rows = [
        "| architecture | outcome | attention | caches | own code | unrecognised | logits | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        own = _counts(r.own_code)
        error = "" if r.logit_error is None else f"{r.logit_error:.0e}"
        rows.append(
            f"| {r.name} | {r.outcome} | {', '.join(r.attention)} | {'; '.join(r.caches)} | {own} "
            f"| {_counts(r.unrecognised)} | {error} | {r.seconds:.1f} |"
        )
    return "\n".join(rows) + "\n"


def _counts(values: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in values.items())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def compare(old: Mapping[str, Record], new: Iterable[Record]) -> list[str]:
    """One line for each architecture whose outcome, caches or attention changed."""
    lines = []
    fresh = {record.name: record for record in new}
    for name, record in fresh.items():
        before = old.get(name)
        if before is None:
            lines.append(f"{name}: new, {record.outcome}")
            continue
        for field in ("outcome", "attention", "caches", "own_code"):
            a, b = getattr(before, field), getattr(record, field)
            if a != b:
                lines.append(f"{name}: {field} was {_plain(a)}, is {_plain(b)}")
    lines += [f"{name}: gone" for name in old if name not in fresh]
    return lines


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return _counts(value) or "none"
    return "; ".join(value) or "none" if isinstance(value, list) else str(value)
