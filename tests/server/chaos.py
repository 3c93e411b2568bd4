"""Engines that are killed under load: what clients hear of it, how soon, and what stays behind.

    python tests/server/chaos.py --kills 20
    python tests/server/chaos.py --kills 20 --replicas 2

A server in a process of its own (`--on-engine-death restart`), clients that never stop asking, half
of them for streams, and SIGKILL of an engine at random moments: under load, while prompts are
computed, while it is starting again. Prints JSON.
"""

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from random import Random

import psutil
from served_process import KEY, Served

from autodeploy.bench.http_client import (
    Address,
    Connections,
    LoadError,
    completion_tokens,
    fast_loop,
)
from autodeploy.bench.latencies import Served as Reads
from autodeploy.bench.processes import resident_bytes

PROMPTS = 48
VOCABULARY = 4000
WAYS = ("load", "prefill", "start")
"""When the engine is killed, in turn: under load, while a burst of long prompts is computed, or
under load and once more while it is starting again."""
BURST = 24
PATIENCE_SECONDS = 60
"""A request that takes longer hangs."""
NOTICED_SECONDS = 1.0
MIB = 2**20


@dataclass
class Kill:
    """One SIGKILL. Seconds count from it."""

    way: str
    pid: int
    at: float
    """By `time.perf_counter`."""
    open: int = 0
    """Requests without their end at that moment."""
    failed: int = 0
    """Those of them that heard of it as an error."""
    last_error: float = 0.0
    """When the last of them had heard."""
    last_end: float = 0.0
    """When the last of all had its end; with several replicas, those of the others go on."""
    back: float = 0.0
    """When a request sent after it was answered by an engine that was not killed."""
    answered_meanwhile: int = 0
    """Requests answered until every engine was back."""
    whole: float = 0.0
    """When all engines were back."""


@dataclass
class Outcome:
    """Figures of a run. Sizes in MiB."""

    replicas: int = 1
    kills: list[Kill] = field(default_factory=list)
    answered: int = 0
    refused: int = 0
    """Requests that heard of a dead engine when it was dead."""
    wrong: list[str] = field(default_factory=list)
    """Answers that are others than those before the first kill, and ends that are none."""
    probes_down: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of each outage by /health and /ready."""
    probes_failed: list[str] = field(default_factory=list)
    front_mib: list[float] = field(default_factory=list)
    """Before the first kill and after each."""
    before: dict = field(default_factory=dict)
    """What the server's process holds, before the first kill."""
    after: dict = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    """Processes, files and shared memory that are there when the server has ended."""
    status: int | None = None
    log: str = ""

    @property
    def longest_error(self):
        return max(kill.last_error for kill in self.kills)

    def report(self):
        said = {**asdict(self), "longest_error": self.longest_error}
        said["wrong"], said["causes"] = len(self.wrong), sorted(set(self.wrong))[:5]
        said["back_longest"] = max(kill.back for kill in self.kills)
        said["front_growth_mib"] = self.front_mib[-1] - self.front_mib[0]
        said["load_average"] = os.getloadavg()[0]
        del said["log"]
        return said


def chaos(kills, clients=100, replicas=1, seed=0, most_wait=3.0):
    """Runs a server and the load, and kills `kills` engines.

    most_wait: seconds, at most, between an engine's return and the next kill.
    """
    folder = tempfile.mkdtemp(prefix="chaos-")
    served = Served(
        "--dtype", "float32", "--max-num-seqs", "32", "--max-num-batched-tokens", "512",
        "--kv-cache-memory-bytes", str(64 * MIB), "--on-engine-death", "restart",
        "--data-parallel-size", str(replicas), "--max-open-sequences", "4096",
        environment={"TMPDIR": folder},
    )  # fmt: skip
    family = []
    try:
        run = _Chaos(served, clients, replicas, seed, most_wait)
        with fast_loop() as runner:
            outcome = runner.run(run.run(kills))
        family = psutil.Process(served.process.pid).children(recursive=True)
        served.process.send_signal(signal.SIGTERM)
    except BaseException:
        served.process.kill()
        raise
    finally:
        ended = served.end()
        names = os.listdir(folder)
        shutil.rmtree(folder)
    outcome.status, outcome.log = ended
    psutil.wait_procs(family, timeout=5)
    outcome.left = [f"process {p.pid}" for p in family if p.is_running()]
    # The other is PyTorch's, and meant to stay.
    outcome.left += [f"file {n}" for n in names if not n.startswith("torchinductor_")]
    owners = {served.process.pid, *(kill.pid for kill in outcome.kills), *(p.pid for p in family)}
    outcome.left += [f"shared memory {n}" for n in os.listdir("/dev/shm") if _owner(n) in owners]
    return outcome


def _owner(name):
    """Who made a piece of shared memory, by PyTorch's way to name it."""
    found = re.match(r"torch_(\d+)_", name)
    return int(found[1]) if found else None


class _Chaos:
    def __init__(self, served, clients, replicas, seed, most_wait):
        self.served, self.pid = served, served.process.pid
        self.replicas, self.most_wait = replicas, most_wait
        self.address = Address.of(served.url, KEY)
        self.connections = Connections(self.address)
        self.clients, self.random = clients, Random(seed)
        self.outcome = Outcome(replicas)
        self.open = {}
        """When each open request was sent, by its number."""
        self.sent = 0
        self.watched = None
        """The kill that is being followed."""
        self.stops = False
        self.bodies = [self.body() for _ in range(PROMPTS)]
        self.expected = []

    def body(self, shortest=10, longest=80):
        length = self.random.randint(shortest, longest)
        return {
            "prompt": [self.random.randrange(3, VOCABULARY) for _ in range(length)],
            "max_tokens": self.random.randint(4, 48), "ignore_eos": True, "temperature": 0,
        }  # fmt: skip

    async def run(self, kills):
        for body in self.bodies:
            text = await self.ask(body)
            self.expected.append((text, body["max_tokens"]))
        self.outcome.front_mib.append(resident_bytes(self.pid) / MIB)
        self.outcome.before = self.holds()
        tasks = [asyncio.create_task(self.client(n)) for n in range(self.clients)]
        tasks += [asyncio.create_task(self.probe(path)) for path in ("/health", "/ready")]
        try:
            while len(self.outcome.kills) < kills:
                await self.one_kill(WAYS[len(self.outcome.kills) % len(WAYS)])
                self.outcome.front_mib.append(resident_bytes(self.pid) / MIB)
            self.stops = True
            await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE_SECONDS)
        finally:
            for task in tasks:
                task.cancel()
            self.connections.close()
        self.outcome.after = self.holds()
        return self.outcome

    # Clients.

    async def client(self, number):
        """Asks again and again; even numbers for streams."""
        source = Random(number)
        while not self.stops:
            which = source.randrange(PROMPTS)
            text, tokens = await self.follow(self.bodies[which], streams=number % 2 == 0)
            if text is None:
                # As OpenAI's clients do, by Retry-After.
                await asyncio.sleep(source.uniform(0.5, 1.5))
                continue
            # Of a stream only the end is kept.
            expected, wanted = self.expected[which]
            same = expected.endswith(text) if number % 2 == 0 else expected == text
            if not (same and tokens == wanted and text):
                self.outcome.wrong.append(f"prompt {which}: {text!r:.80} is not {expected!r:.80}")

    async def follow(self, body, streams):
        """Text and number of tokens of one request; None if it ended with an error that is due."""
        number = self.sent = self.sent + 1
        self.open[number] = time.perf_counter()
        body = {**body, "stream": streams}
        if streams:
            body["stream_options"] = {"include_usage": True}
        request = self.address.request("POST", "/v1/completions", body)
        error = None
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                answer = await self.connections.ask(request, Reads(0.0))
        except (LoadError, TimeoutError) as raised:
            error = raised
        self.note_end(number, error)
        if error is not None:
            return None, 0
        if not re.search(rb'"finish_reason": ?"length"', answer):
            self.outcome.wrong.append(f"an answer without a finish reason: {answer[-200:]!r}")
        return _text(answer, streams), completion_tokens(answer)

    def note_end(self, number, error):
        began, kill = self.open.pop(number), self.watched
        now = time.perf_counter()
        if kill is not None and began < kill.at:
            kill.last_end = now - kill.at
            if error is not None:
                kill.failed += 1
                kill.last_error = now - kill.at
        if error is None:
            self.outcome.answered += 1
            if kill is not None and began > kill.at:
                kill.back = kill.back or now - kill.at
                kill.answered_meanwhile += not kill.whole
            return
        code = re.search(r'"code": ?"(\w+)"', str(error))
        cause = code[1] if code else f"{type(error).__name__}: {error}"
        if cause != "engine_dead" or not self.is_due(began):
            self.outcome.wrong.append(f"nobody should have heard of this: {cause:.300}")
            return
        self.outcome.refused += 1

    def is_due(self, began):
        """Whether a request sent then may hear that the engine is dead."""
        kill = self.watched
        if kill is None or (kill.whole and began > kill.at + kill.whole):
            return False
        # With another replica, only who was there at the kill, or came before it was noticed.
        return self.replicas == 1 or began < kill.at + NOTICED_SECONDS

    async def ask(self, body):
        request = self.address.request("POST", "/v1/completions", body)
        return _text(await self.connections.ask(request, Reads(0.0)), streams=False)

    async def probe(self, path):
        """Notes how long a probe says 503, and whether it ever says nothing."""
        down = None
        lengths = self.outcome.probes_down.setdefault(path, [])
        request = self.address.request("GET", path)
        while not self.stops or down:
            try:
                async with asyncio.timeout(5):
                    await self.connections.ask(request, Reads(0.0))
            except (LoadError, TimeoutError) as error:
                if not str(error).startswith("status 503"):
                    self.outcome.probes_failed.append(f"{path}: {type(error).__name__} {error}")
                down = down or time.perf_counter()
            else:
                if down:
                    lengths.append(round(time.perf_counter() - down, 3))
                down = None
            await asyncio.sleep(0.05)

    # Kills.

    async def one_kill(self, way):
        await asyncio.sleep(self.random.uniform(0.2, self.most_wait))
        burst = []
        if way == "prefill":
            bodies = [self.body(500, 900) for _ in range(BURST)]
            burst = [asyncio.create_task(self.follow(b, streams=False)) for b in bodies]
            await asyncio.sleep(self.random.uniform(0.02, 0.3))
        before = set(self.engines())
        victim = self.random.choice(sorted(before))
        self.kill(way, victim)
        if way == "start":
            found = await self.until(lambda: set(self.engines()) - before)
            # Python, imports, weights: 2 to 5 seconds.
            await asyncio.sleep(self.random.uniform(0.0, 2.0))
            await self.ended_of(self.outcome.kills[-1])
            if await self.living() < self.replicas:
                self.kill("again", found.pop())
        await self.ended_of(self.outcome.kills[-1])
        await self.all_back()
        await asyncio.gather(*burst)
        self.watched = None

    def kill(self, way, pid):
        os.kill(pid, signal.SIGKILL)
        kill = Kill(way, pid, time.perf_counter(), open=len(self.open))
        self.outcome.kills.append(kill)
        self.watched = kill

    async def ended_of(self, kill):
        await self.until(lambda: not any(began < kill.at for began in self.open.values()))

    async def all_back(self):
        """Waits until every replica serves, and a request sent since then is answered."""
        kill = self.watched
        await self.until(lambda: kill.pid not in self.engines())
        deadline = time.perf_counter() + PATIENCE_SECONDS
        while min(len(self.engines()), await self.living()) < self.replicas:
            assert time.perf_counter() < deadline, "an engine does not come back"
            await asyncio.sleep(0.05)
        kill.whole = time.perf_counter() - kill.at
        await self.until(lambda: kill.back)

    async def living(self):
        replicas = (await self.connections.get("/api/status"))["replicas"]
        return sum(replica["state"] == "serving" for replica in replicas)

    async def until(self, condition):
        deadline = time.perf_counter() + PATIENCE_SECONDS
        while not (found := condition()):
            assert time.perf_counter() < deadline, "it did not come about"
            await asyncio.sleep(0.05)
        return found

    def engines(self):
        """Process ids of the engines that live, ready or not."""
        return [engine.pid for engine in self.served.engines()]

    # What stays.

    def holds(self):
        """Children, threads and open files of the server's process."""
        process = psutil.Process(self.pid)
        clients = {connection.fd for connection in process.net_connections("tcp")}
        files = {}
        for number in os.listdir(f"/proc/{self.pid}/fd"):
            if int(number) in clients:
                continue
            with suppress(OSError):
                kind = os.readlink(f"/proc/{self.pid}/fd/{number}").partition(":[")[0]
                files[kind] = files.get(kind, 0) + 1
        return {
            "children": len(process.children(recursive=True)),
            "threads": process.num_threads(),
            "files": files,
        }


def _text(answer, streams):
    """The text of a whole answer, or of those events of a stream's end whose all is there."""
    if not streams:
        return json.loads(answer)["choices"][0]["text"]
    text = ""
    for data in re.findall(rb"data: (\{.*\})\n\n", answer):
        for choice in json.loads(data)["choices"]:
            text += choice["text"]
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    outcome = chaos(args.kills, args.clients, args.replicas, args.seed)
    print(json.dumps(outcome.report(), indent=1))


if __name__ == "__main__":
    main()
