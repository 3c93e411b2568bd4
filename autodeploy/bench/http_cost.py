"""What HTTP costs: LLM.generate, whole answers and streams, in turn on the same work.

The engine is in a process of its own in all three, with the same options; the client of the server
is this process. With few cores the client competes with the engine, so CPU seconds are told, too:
of the front (the server, or `LLM.generate`'s caller), of the engine, and of the client.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import EngineError
from ..llm import LLM
from .processes import cpu_seconds, engine_of, resident_bytes
from .remote import Load, address_of, run_load
from .target import Target
from .throughput import run_autodeploy
from .workload import Workload

WAYS = ("generate", "whole", "streamed")


def measure(
    target: Target, work_of: Callable[[int], Workload], concurrency: int | None, repeat: int
) -> dict[str, Any]:
    """Figures of each way: tokens_per_second (median, and all runs), CPU us per output token.

    work_of: the work, for a size of vocabulary.

    Raises:
        EngineError: the server does not start, or loses a request.
    """
    target.options["executor"] = "process"
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with target.deploy() as llm, served(target) as (url, pid):
        work = work_of(llm.vocab_size)
        ways: dict[str, Callable[[], dict[str, float]]] = {
            "generate": lambda: _generate(llm, work),
            "whole": lambda: _over_http(
                url, pid, work, Load(concurrency=concurrency, streams=False)
            ),
            "streamed": lambda: _over_http(url, pid, work, Load(concurrency=concurrency)),
        }
        for _ in range(repeat + 1):
            for way, run in ways.items():
                runs[way].append(run())
    report: dict[str, Any] = {"load_average": os.getloadavg()[0], "cpus": os.cpu_count()}
    for way in WAYS:
        warm = runs[way][1:]
        report[way] = {name: statistics.median(r[name] for r in warm) for name in warm[0]}
        report[way]["runs"] = [r["tokens_per_second"] for r in warm]
    for way in WAYS[1:]:
        # Of rounds, each of which is on the machine as it was then.
        ratios = [
            r["tokens_per_second"] / g["tokens_per_second"]
            for r, g in zip(runs[way][1:], runs["generate"][1:], strict=True)
        ]
        report[way]["of_generate"] = statistics.median(ratios)
    return report


def table(report: dict[str, Any]) -> str:
    """The report as aligned text."""
    lines = [
        f"{'way':10} {'tok/s':>8} {'of generate':>12} {'front':>8} {'engine':>8} {'client':>8}"
        "   (CPU us per output token)"
    ]
    for way in WAYS:
        found = report[way]
        ratio = f"{found['of_generate']:.3f}" if "of_generate" in found else "1"
        lines.append(
            f"{way:10} {found['tokens_per_second']:8,.0f} {ratio:>12} {found['front_us']:8.1f} "
            f"{found['engine_us']:8.1f} {found['client_us']:8.1f}"
        )
    return "\n".join([*lines, f"load average {report['load_average']:.1f}, {report['cpus']} CPUs"])


def _generate(llm: LLM, work: Workload) -> dict[str, float]:
    engine = engine_of(os.getpid())
    front_before, engine_before = time.process_time(), cpu_seconds(engine)
    result = run_autodeploy(llm, work)
    return _figures(
        result.output_tokens, result.seconds, time.process_time() - front_before,
        cpu_seconds(engine) - engine_before, 0.0,
    )  # fmt: skip


def _over_http(url: str, pid: int, work: Workload, load: Load) -> dict[str, float]:
    engine = engine_of(pid)
    front_before, engine_before = cpu_seconds(pid), cpu_seconds(engine)
    run = run_load(address_of(url), "bench", work, load)
    if run.failed or run.tokens != work.output_tokens:
        raise EngineError(
            f"{len(run.failed)} requests failed, {run.tokens} of {work.output_tokens} tokens came: "
            f"{run.failed[:1]}"
        )
    figures = _figures(
        run.tokens, run.seconds, cpu_seconds(pid) - front_before,
        cpu_seconds(engine) - engine_before, run.client_seconds,
    )  # fmt: skip
    figures["events_per_token"] = sum(s.events for s in run.served) / run.tokens
    figures["front_mib"] = resident_bytes(pid) / 2**20
    return figures


def _figures(
    tokens: int, seconds: float, front: float, engine: float, client: float
) -> dict[str, float]:
    return {
        "tokens_per_second": tokens / seconds,
        "front_us": 1e6 * front / tokens,
        "engine_us": 1e6 * engine / tokens,
        "client_us": 1e6 * client / tokens,
    }


@contextlib.contextmanager
def served(target: Target, **options: Any) -> Iterator[tuple[str, int]]:
    """A server of the target in a process of its own: its URL and process id.

    Raises:
        EngineError: it does not start.
    """
    if target.model is None:
        raise EngineError("a server needs a checkpoint; name one with --model")
    settings = {"model": target.model, "port": 0, "served_model_name": ["bench"]}
    given = {k: v for k, v in target.options.items() if v is not None}
    with tempfile.TemporaryDirectory(prefix="autodeploy-http-") as folder:
        config = Path(folder) / "serve.json"
        config.write_text(json.dumps({**settings, "max_open_sequences": 2**20, **given, **options}))
        command = [sys.executable, "-m", "autodeploy", "serve", "--config", str(config)]
        with open(Path(folder) / "log", "w+") as log:
            server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
            try:
                assert server.stdout is not None
                line = server.stdout.readline()
                if not line:
                    log.seek(0)
                    raise EngineError(f"the server did not start:\n{log.read()[-2000:]}")
                yield line.split()[-1], server.pid
            finally:
                server.terminate()
                server.wait(60)
