"""`autodeploy serve` as people run it: a process, with an engine in another one."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import psutil
from running_server import DEMO

KEY = "of-the-environment"
LONG = {"prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True}

# The demo model's own template shows no tools; this is how Hermes and Qwen write them.
TOOL_TEMPLATE = """\
{{ bos_token }}\
{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}
Call one as <tool_call>{"name": ..., "arguments": ...}</tool_call><|end|>{% endif %}\
{% for message in messages %}{{ '<|' + message.role + '|>' }}{{ message.content or '' }}\
{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>\
{% endfor %}<|end|>{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def demo_with_tools(folder: Path) -> str:
    """The demo model in `folder`, with a chat template that shows tools."""
    for file in Path(DEMO).iterdir():
        (folder / file.name).symlink_to(file)
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    config.unlink()
    config.write_text(json.dumps({**settings, "chat_template": TOOL_TEMPLATE}))
    return str(folder)


class Served:
    """A server of the demo model with some flags, until `end`.

    environment: variables besides those of this process.
    """

    def __init__(self, *flags, model=DEMO, environment=()):
        command = [sys.executable, "-m", "autodeploy", "serve", *([model] if model else [])]
        environment = {**os.environ, "AUTODEPLOY_API_KEY": KEY, **dict(environment)}
        # Not a pipe: a full one would stop a server that writes a line per request.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `end`
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--device", "cpu", *flags],
            stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment,
        )  # fmt: skip
        line = self.process.stdout.readline()
        self.url = re.search(r"https?://\S+", line)[0] if "://" in line else line
        self.client = httpx.Client(
            base_url=self.url, timeout=60, headers={"Authorization": f"Bearer {KEY}"}
        )

    def engine(self):
        """The process of the engine; of several, that of the oldest."""
        return self.engines()[0]

    def engines(self):
        """The processes of engines that live, ready or not, oldest first."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            # It may end while somebody looks.
            with contextlib.suppress(psutil.Error):
                # Python's resource tracker is a child, too.
                engine = "spawn_main" in " ".join(child.cmdline())
                if engine and child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child)
        return sorted(found, key=lambda child: child.create_time())

    def stream(self, **fields):
        return self.client.stream("POST", "/v1/completions", json={**LONG, **fields})

    def end(self):
        """Exit status and what was printed on standard error."""
        self.client.close()
        self.process.communicate(timeout=60)
        with self._errors as errors:
            errors.seek(0)
            return self.process.returncode, errors.read()
