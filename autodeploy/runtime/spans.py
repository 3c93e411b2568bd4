"""Named spans of the engine's step, for profiles."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch.autograd import profiler

WAIT = "autodeploy: wait for the device"
_NOTHING = nullcontext()


def span(name: str) -> AbstractContextManager[object]:
    """A span of this name in the profile that is being taken; next to nothing if none is."""
    if profiler._is_profiler_enabled:  # type: ignore[attr-defined, unused-ignore]
        return profiler.record_function(name)
    return _NOTHING
