"""Start-up: seconds from deploy() to the first token, cold and warm, and what stays resident.

Each start runs in a process of its own. Cold has an empty artifact cache; warm has the cache
that the cold one left. Seconds of `import autodeploy` with torch and transformers are apart.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..errors import EngineError
from .target import Target

_CHILD = """
import json, sys, time
began = time.perf_counter()
import torch, transformers
from autodeploy import SamplingParams
from autodeploy.bench.memory import memory_report
from autodeploy.bench.target import Target
imported = time.perf_counter()
llm = Target(**json.loads(sys.argv[1])).deploy()
deployed = time.perf_counter()
llm.generate([[1, 2, 3, 4]], SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
first = time.perf_counter()
llm.generate([[1, 2, 3, 4]] * 8, SamplingParams(max_tokens=64, temperature=0), use_tqdm=False)
mib = {name: value / 2**20 for name, value in memory_report(llm).items()}
print(json.dumps({
    "import": imported - began, "deploy": deployed - imported, "first_token": first - deployed,
    "resident_mib": mib["resident"], "weights_mib": mib["weights"], "caches_mib": mib["caches"],
    "rest_mib": mib["resident"] - mib["weights"] - mib["caches"],
    "device_mib": mib.get("device"), "phases": llm.summary,
}))
"""


def measure(target: Target) -> dict[str, dict[str, Any]]:
    """Figures of a cold and of a warm start, by name.

    Raises:
        EngineError: a start failed; the message is the child's.
    """
    with tempfile.TemporaryDirectory(prefix="autodeploy-startup-") as cache:
        environment = {**os.environ, "AUTODEPLOY_CACHE": cache}
        # What the kernels' own compiler keeps counts as ours: a cold start compiles them.
        environment["TRITON_CACHE_DIR"] = str(Path(cache) / "triton")
        return {name: _start(target, environment) for name in ("cold", "warm")}


def table(report: dict[str, dict[str, Any]]) -> str:
    """Both starts as aligned text, and the memory of the warm one."""
    head = f"{'start':6} {'import':>7} {'deploy':>7} {'first token':>12} {'deploy to token':>16}"
    lines = [head]
    for name, row in report.items():
        total = row["deploy"] + row["first_token"]
        lines.append(
            f"{name:6} {row['import']:7.2f} {row['deploy']:7.2f} {row['first_token']:12.2f} "
            f"{total:16.2f}"
        )
    row = report["warm"]
    if row["device_mib"] is None:
        lines.append(
            f"memory: {row['resident_mib']:.0f} MiB resident, of it {row['weights_mib']:.0f} "
            f"weights and {row['caches_mib']:.0f} caches (touched); the rest is "
            f"{row['rest_mib']:.0f}"
        )
    else:
        lines.append(
            f"memory: {row['resident_mib']:.0f} MiB resident on the host; at most "
            f"{row['device_mib']:.0f} on the device, of it {row['weights_mib']:.0f} weights and "
            f"{row['caches_mib']:.0f} caches"
        )
    return "\n".join(lines)


def _start(target: Target, environment: dict[str, str]) -> dict[str, Any]:
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps(dataclasses.asdict(target))],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if child.returncode:
        raise EngineError(f"the start failed: {child.stderr.strip().splitlines()[-1]}")
    figures: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return figures
