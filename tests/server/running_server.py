"""A server of the demo model in a thread of this process, with an engine one can look at."""

import threading
import time
from pathlib import Path

import httpx

from autodeploy import AsyncLLM
from autodeploy.build import build_engine
from autodeploy.checkpoint import load_tokenizer
from autodeploy.config import DeployConfig
from autodeploy.runtime.executor import InProcessExecutor
from autodeploy.server.app import build_app
from autodeploy.server.config import ServerConfig
from autodeploy.server.engine_host import EngineHost
from autodeploy.server.replica import Replica
from autodeploy.server.serving import Server, bound_socket, uvicorn_config

DEMO = str(Path(__file__).resolve().parents[2] / "examples" / "demo_model")


def demo_engine(**options):
    config = DeployConfig(DEMO, device="cpu", **{"max_num_seqs": 16, **options})
    executor = InProcessExecutor(lambda: build_engine(config))
    return AsyncLLM.from_parts(executor, load_tokenizer(DEMO), DEMO)


class RunningServer:
    """Serves until `close`. engines: of its replicas; otherwise there are `replicas` of the demo
    model."""

    def __init__(self, *engines, build=None, replicas=1, **options):
        config = ServerConfig(port=0, **{"served_model_name": ["demo"], **options})
        engines = engines or [demo_engine() for _ in range(replicas)]
        self.host = EngineHost([Replica(engine, build) for engine in engines])
        self.app = build_app(config, self.host, DEMO)
        self.service = self.app.state.service
        listener = bound_socket(config)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.server = Server(uvicorn_config(self.app, config), self.service)
        self._thread = threading.Thread(target=self.server.run, args=([listener],), daemon=True)
        self._thread.start()
        self.client = httpx.Client(base_url=self.url, timeout=60)
        eventually(lambda: self.server.started)

    def post(self, path, **fields):
        return self.client.post(path, json=fields)

    def stop(self):
        """What a signal does."""
        self.server.handle_exit(15, None)

    def join(self):
        self._thread.join(60)
        assert not self._thread.is_alive()

    def close(self):
        self.client.close()
        if self._thread.is_alive():
            self.service.admission.ended.set()
            self.stop()
        self.join()

    def pages_used(self):
        executor = self.host.llm._executor
        with executor._work:
            executor._engine.step()
            return executor._engine.stats().pages_used


def eventually(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not come about within {seconds} seconds"
        time.sleep(0.01)
