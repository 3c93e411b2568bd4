"""response_format: what form an output must have, as a change of SamplingParams."""

from __future__ import annotations

from typing import Any

from ..runtime.sampling_params import SamplingParams
from .errors import invalid


def constrained(params: SamplingParams, response_format: dict[str, Any] | None) -> SamplingParams:
    """`params` under which only outputs of the asked form can be made.

    Raises:
        ApiError: the form is unknown or cannot be served.
    """
    kind = "text" if response_format is None else response_format.get("type")
    if kind != "text":
        raise invalid(
            f"response_format of type {str(kind)!r:.60} is not served here; use 'text'",
            "response_format",
        )
    return params
