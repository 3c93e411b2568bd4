"""`autodeploy serve` of the demo model as a process of its own."""

import os
import re
import subprocess
import sys

import httpx
import psutil
from running_server import DEMO

LONG = {"prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True}


class Served:
    """`autodeploy serve` of the demo model with some flags."""

    def __init__(self, *flags, model=DEMO):
        command = [sys.executable, "-m", "autodeploy", "serve", *([model] if model else [])]
        environment = {**os.environ, "AUTODEPLOY_API_KEY": "of-the-environment"}
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--device", "cpu", *flags],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        line = self.process.stdout.readline()
        self.url = re.search(r"https?://\S+", line)[0] if "://" in line else line
        self.client = httpx.Client(
            base_url=self.url, timeout=30, headers={"Authorization": "Bearer of-the-environment"}
        )

    def engine(self):
        """The process of the engine."""
        return self.engines(1)[0]

    def engines(self, count):
        """The processes of `count` engines, oldest first."""
        children = psutil.Process(self.process.pid).children()
        children.sort(key=lambda child: child.memory_info().rss)
        return sorted(children[-count:], key=lambda child: child.create_time())

    def stream(self, **fields):
        return self.client.stream("POST", "/v1/completions", json={**LONG, **fields})

    def end(self):
        """Exit status and what was printed on standard error."""
        self.client.close()
        _, errors = self.process.communicate(timeout=20)
        return self.process.returncode, errors
