"""Start-up: seconds from deploy() to the first token, cold and warm, and what stays resident.

Each start runs in a process of its own. Cold has an empty artifact cache; warm has the cache
that the cold one left. Seconds of `import autodeploy` with torch and transformers are apart.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from ..errors import EngineError

_CHILD = """
import json, sys, time
began = time.perf_counter()
import torch, transformers
from autodeploy import SamplingParams, deploy
from autodeploy.bench.memory import memory_report
from autodeploy.llm import LLM
imported = time.perf_counter()
llm = deploy(sys.argv[1], recipe=sys.argv[2])
deployed = time.perf_counter()
llm.generate([[1, 2, 3, 4]], SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
first = time.perf_counter()
llm.generate([[1, 2, 3, 4]] * 8, SamplingParams(max_tokens=64, temperature=0), use_tqdm=False)
mib = {name: value / 2**20 for name, value in memory_report(llm).items()}
print(json.dumps({
    "import": imported - began, "deploy": deployed - imported, "first_token": first - deployed,
    "resident_mib": mib["resident"], "weights_mib": mib["weights"], "caches_mib": mib["caches"],
    "rest_mib": mib["resident"] - mib["weights"] - mib["caches"], "phases": llm.summary,
}))
"""


def measure(model: str, recipe: str = "default") -> dict[str, dict[str, Any]]:
    """Figures of a cold and of a warm start, by name.

    Raises:
        EngineError: a start failed; the message is the child's.
    """
    with tempfile.TemporaryDirectory(prefix="autodeploy-startup-") as cache:
        environment = {**os.environ, "AUTODEPLOY_CACHE": cache}
        return {name: _start(model, recipe, environment) for name in ("cold", "warm")}


def _start(model: str, recipe: str, environment: dict[str, str]) -> dict[str, Any]:
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, model, recipe],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if child.returncode:
        raise EngineError(f"the start failed: {child.stderr.strip().splitlines()[-1]}")
    figures: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return figures
