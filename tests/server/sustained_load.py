"""Sustained load on a server in a process of its own: what is lost, what memory grows, what stays.

    python tests/server/sustained_load.py --requests 10000 --concurrency 500

A part of the clients leaves, half of them after some output, half at any moment. Prints JSON.
"""

import argparse
import asyncio
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

from autodeploy.bench.http_client import (
    Connections,
    LoadError,
    completion_tokens,
    fast_loop,
)
from autodeploy.bench.http_cost import served
from autodeploy.bench.latencies import Served
from autodeploy.bench.processes import engine_of, resident_bytes
from autodeploy.bench.remote import address_of
from autodeploy.bench.target import Target

DEMO = str(Path(__file__).resolve().parents[2] / "examples" / "demo_model")
WARM_REQUESTS = 1000
VOCABULARY = 4000
PAGES = 1536
"""Of 16 tokens: 128 sequences of 84 tokens take half of them."""
MIB = 2**20


@dataclass
class Outcome:
    """Figures of a load. Sizes in MiB."""

    answered: int = 0
    left: int = 0
    lost: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    front_mib: list[float] = field(default_factory=list)
    """About every second from the moment at which WARM_REQUESTS were over."""
    engine_mib: list[float] = field(default_factory=list)
    at_the_end: dict = field(default_factory=dict)
    """What the server says when everybody is gone."""

    @property
    def front_growth(self):
        return max(self.front_mib) - self.front_mib[0]

    @property
    def engine_growth(self):
        return max(self.engine_mib) - self.engine_mib[0]

    def report(self):
        said = {**asdict(self), "lost": len(self.lost), "causes": sorted(set(self.lost))[:3]}
        for name in ("front_mib", "engine_mib"):
            sizes = getattr(self, name)
            said[name] = [round(s, 1) for s in sizes[:: max(1, len(sizes) // 20)]]
        return {
            **said, "front_growth_mib": self.front_growth, "engine_growth_mib": self.engine_growth,
            "load_average": os.getloadavg()[0],
        }  # fmt: skip


def sustain(requests, concurrency, leavers, seed=0, **options):
    """Runs a server and the load. leavers: the part of the clients that leaves, 0 to 1."""
    # Pages are taken from the machine when they are first written: of so few, all are by the time
    # memory is looked at. The others would be cached prefixes, and look like a leak.
    engine = {"executor": "process", "max_num_seqs": 128, "num_pages": PAGES, **options}
    target = Target(DEMO, "", 0, engine)
    with served(target) as (url, pid), fast_loop() as runner:
        return runner.run(_Load(url, pid, leavers, seed).run(requests, concurrency))


class _Load:
    def __init__(self, url, pid, leavers, seed):
        self.address = address_of(url)
        self.connections = Connections(self.address)
        self.pid, self.engine = pid, engine_of(pid)
        self.leavers, self.random = leavers, Random(seed)
        self.outcome = Outcome()
        self.began = time.perf_counter()

    async def run(self, requests, concurrency):
        work = iter(range(requests))
        watch = asyncio.create_task(self.watch())
        await asyncio.gather(*(self.client(work) for _ in range(concurrency)))
        self.outcome.seconds = time.perf_counter() - self.began
        watch.cancel()
        self.sample()
        self.outcome.at_the_end = await self.settled()
        self.connections.close()
        return self.outcome

    async def client(self, work):
        for _ in work:
            try:
                await self.one()
            except LoadError as error:
                self.outcome.lost.append(str(error))

    async def one(self):
        tokens = self.random.randint(4, 24)
        body = {
            "model": "bench", "max_tokens": tokens, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True},
            "prompt": [
                self.random.randrange(VOCABULARY) for _ in range(self.random.randint(20, 60))
            ],
        }  # fmt: skip
        request = self.address.request("POST", "/v1/completions", body)
        leaves = self.random.random() < self.leavers
        reads = self.random.randint(1, tokens) if leaves and self.random.random() < 0.5 else None
        patience = self.random.uniform(0.0, self.mean_seconds()) if leaves and not reads else None
        try:
            async with asyncio.timeout(patience):
                answer = await self.connections.ask(request, Served(0.0), reads)
        except TimeoutError:
            answer = b""
        if not answer:
            self.outcome.left += 1
            return
        made = completion_tokens(answer)
        if made != tokens:
            raise LoadError(f"{made} tokens came of {tokens}")
        self.outcome.answered += 1
        self.outcome.tokens += made

    def mean_seconds(self):
        """About what a request takes, from how many have ended."""
        over = self.outcome.answered + self.outcome.left
        return 500 * (time.perf_counter() - self.began) / max(over, 500)

    async def watch(self):
        while True:
            await asyncio.sleep(1.0)
            if self.outcome.answered + self.outcome.left >= WARM_REQUESTS:
                self.sample()

    def sample(self):
        self.outcome.front_mib.append(resident_bytes(self.pid) / MIB)
        self.outcome.engine_mib.append(resident_bytes(self.engine) / MIB)

    async def settled(self):
        """The server's status when nothing runs any more, or after 20 seconds."""
        deadline = time.perf_counter() + 20
        while True:
            status = await self.connections.get("/api/status")
            stats = status["stats"]
            found = {name: stats[name] for name in ("running", "waiting", "pages_used", "aborted")}
            found["open_requests"] = status["open_requests"]
            idle = not any(v for name, v in found.items() if name != "aborted")
            if idle or time.perf_counter() > deadline:
                return found
            await asyncio.sleep(0.2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=500)
    parser.add_argument("--leavers", type=float, default=1 / 3, help="part that leaves, 0 to 1")
    args = parser.parse_args()
    print(json.dumps(sustain(args.requests, args.concurrency, args.leavers).report(), indent=1))


if __name__ == "__main__":
    main()
