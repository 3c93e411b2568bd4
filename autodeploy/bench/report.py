"""Rows of figures beside the floor of the same work, as a table and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..custom_ops.cost import Cost
    from ..llm import LLM
    from ..transforms.cost import Peaks

_UNCOUNTED = "parts of the model run as its own code"


@dataclass(frozen=True)
class Roof:
    """What bounds a deployed model: its cost and its device's peaks; None with a cause."""

    cost: Cost | None
    peaks: Peaks | None
    cause: str = ""

    @classmethod
    def over(cls, llm: LLM) -> Roof:
        """The roof over a deployed model; measures the device if its peaks are not known."""
        if llm.cost is None:
            return cls(None, None, llm.summary.get("cause", _UNCOUNTED))
        # Here, not above: a client of a server elsewhere needs no torch.
        import torch

        from ..transforms.cost import peaks_of

        dtype = getattr(torch, llm.summary["dtype"])
        return cls(llm.cost, peaks_of(torch.device(llm.summary["device"]), dtype))

    def floor(self, seconds: Callable[[Cost, Peaks], float]) -> float | None:
        """A floor, if there is a roof."""
        if self.cost is None or self.peaks is None:
            return None
        return seconds(self.cost, self.peaks)


@dataclass(frozen=True)
class Row:
    """One figure."""

    kind: str
    name: str
    value: float
    unit: str
    """ms: less is better; tok/s: more is better."""
    floor: float | None = None
    """The best value possible, in the same unit."""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def percent_of_floor(self) -> float | None:
        """100: as fast as the device can."""
        if self.floor is None:
            return None
        ratio = self.floor / self.value if self.unit == "ms" else self.value / self.floor
        return 100 * ratio

    def to_dict(self) -> dict[str, Any]:
        fields = ("kind", "name", "value", "unit", "floor", "percent_of_floor")
        return {**{name: getattr(self, name) for name in fields}, **self.details}


def table(rows: Sequence[Row], cause: str = "") -> str:
    """Rows as aligned text; where there is no floor, a dash, and below the table why.

    The host's time of a step has a column if it is in the details of a row.
    """
    cells = [("work", "measured", "", "floor", "% of floor", "host us")]
    for row in rows:
        percent, host = row.percent_of_floor, row.details.get("host_us")
        cells.append((
            row.name, _number(row.value), row.unit,
            "-" if row.floor is None else _number(row.floor),
            "-" if percent is None else f"{percent:.1f}",
            "-" if host is None else f"{host:.0f}",
        ))  # fmt: skip
    columns = 6 if any("host_us" in row.details for row in rows) else 5
    widths = [max(len(line[i]) for line in cells) for i in range(columns)]
    lines = [
        "  ".join(
            cell.ljust(width) if index in (0, 2) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line[:columns], widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    return "\n".join([*lines, f"no floor: {cause}"] if cause else lines)


def roof_to_dict(roof: Roof) -> dict[str, Any]:
    """For JSON."""
    parts = {"cost": roof.cost, "peaks": roof.peaks}
    found = {k: dataclasses.asdict(v) for k, v in parts.items() if v is not None}
    return {**found, **({"no_floor": roof.cause} if roof.cause else {})}


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"
