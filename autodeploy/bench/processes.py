"""What other processes take: CPU seconds and memory, as /proc has them (Linux)."""

from __future__ import annotations

import os
from pathlib import Path


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and all its threads, of the user's code and the kernel's."""
    # Fields follow the command's name in parentheses; 14 and 15 are the times, in clock ticks.
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM now."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def engine_of(pid: int) -> int:
    """The engine's process of a server or an LLM with `executor='process'`: its busiest child.

    Raises:
        ProcessLookupError: it has none.
    """
    children = [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    if not children:
        raise ProcessLookupError(f"process {pid} has no engine in a process of its own")
    # Python's resource tracker is a child, too.
    return max(children, key=cpu_seconds)
