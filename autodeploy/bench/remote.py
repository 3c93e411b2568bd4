"""Load on a server that runs already, over HTTP: open loop at a rate, or closed with N clients.

The prompts are token ids of the same workloads that are measured in process, so figures compare.
Output tokens are counted by the usage that the server tells. ITL is between reads that brought
output: a server that lags and sends several tokens at once is not shown as a fast one.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from .http_client import Address, Connections, LoadError, completion_tokens, fast_loop
from .latencies import Served, arrivals, latency_rows
from .report import Row
from .workload import Workload

_KEYS = ("AUTODEPLOY_API_KEY", "OPENAI_API_KEY")


@dataclass(frozen=True)
class Load:
    """How requests are made. rate: a second. concurrency: open at once; None: as the rate has it.

    streams: whether answers come piece by piece. extra: fields of every request's body.
    """

    rate: float = float("inf")
    concurrency: int | None = None
    streams: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def name(self) -> str:
        pace = f"at {self.rate:g}/s" if self.concurrency is None else f"{self.concurrency} at once"
        return f"{pace}, {'streamed' if self.streams else 'whole'}"


@dataclass
class Run:
    """What became of a load."""

    served: list[Served]
    failed: list[str]
    """Why requests failed."""
    seconds: float
    client_seconds: float
    """CPU time of this process."""

    @property
    def tokens(self) -> int:
        return sum(s.tokens for s in self.served)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def address_of(base_url: str) -> Address:
    """A server's address, with the key that the environment has for it."""
    keys = (os.environ.get(name, "").split(",")[0].strip() for name in _KEYS)
    return Address.of(base_url, next(filter(None, keys), None))


def look_up(address: Address, model: str | None, vocab: int | None) -> tuple[str, int]:
    """The model's name and the size of its vocabulary, asked for where they are None.

    Raises:
        ConfigError: the server does not tell.
    """

    async def ask() -> tuple[str, int]:
        connections = Connections(address)
        try:
            name = model or (await connections.get("/v1/models"))["data"][0]["id"]
            size = vocab or (await connections.get("/api/status"))["vocab_size"]
        finally:
            connections.close()
        return name, size

    try:
        return asyncio.run(ask())
    except (LoadError, KeyError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"the server does not say what its model or vocabulary is ({error}); if it runs, "
            "give --model NAME and --vocab N"
        ) from error


def run_load(address: Address, model: str, work: Workload, load: Load) -> Run:
    """Makes all requests of `work` and waits for their answers."""
    bodies = list(_bodies(model, work, load))
    requests = [address.request("POST", "/v1/completions", body) for body in bodies]
    with fast_loop() as runner:
        return runner.run(_run(address, requests, load))


def measure(address: Address, model: str, work: Workload, load: Load) -> list[Row]:
    """A row of output tokens/s, and one per latency and percentile.

    Raises:
        ConfigError: no request was answered.
    """
    run = run_load(address, model, work, load)
    for cause in sorted(set(run.failed)):
        print(f"{run.failed.count(cause)} requests failed: {cause}", file=sys.stderr)
    if not run.served:
        raise ConfigError(f"none of {len(run.failed)} requests was answered; see above")
    details = {
        "seconds": run.seconds,
        "rate": f"{load.rate:g}",
        "concurrency": load.concurrency,
        "requests_per_second": len(run.served) / run.seconds,
        "failed": len(run.failed),
        "events_per_token": sum(s.events for s in run.served) / max(1, run.tokens),
        "client_cpu_seconds": run.client_seconds,
    }
    name = f"serve, {len(run.served)} requests {load.name}"
    row = Row("serve", name, run.tokens_per_second, "tok/s", None, details)
    return [row, *latency_rows(run.served)]


def _bodies(model: str, work: Workload, load: Load) -> Iterator[dict[str, Any]]:
    for prompt, output in zip(work.prompts, work.outputs, strict=True):
        body: dict[str, Any] = {
            "model": model, "prompt": prompt, "max_tokens": output, "temperature": 0.0,
            "ignore_eos": True,
        }  # fmt: skip
        if load.streams:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        yield {**body, **load.extra}


async def _run(address: Address, requests: Sequence[bytes], load: Load) -> Run:
    connections = Connections(address)
    places = asyncio.Semaphore(load.concurrency or len(requests))
    served: list[Served] = []
    failed: list[str] = []

    async def one(request: bytes, due: float) -> None:
        await asyncio.sleep(due - time.perf_counter())
        async with places:
            if load.concurrency is not None:
                due = time.perf_counter()
            mine = Served(due)
            try:
                answer = await connections.ask(request, mine)
                mine.tokens = completion_tokens(answer)
                if not mine.times:
                    mine.times.append(time.perf_counter())
            except LoadError as error:
                failed.append(str(error))
            else:
                served.append(mine)

    cpu, began = time.process_time(), time.perf_counter()
    due = [began + at for at in arrivals(len(requests), load.rate, load.seed)]
    try:
        await asyncio.gather(*map(one, requests, due))
    finally:
        connections.close()
    seconds = time.perf_counter() - began
    return Run(served, failed, seconds, time.process_time() - cpu)
