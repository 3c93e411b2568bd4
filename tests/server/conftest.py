"""One server for all tests that only ask it something, and one process for what clients do."""

import os
import signal

import pytest
from running_server import RunningServer
from served_process import Served, demo_with_tools

# Read when LiteLLM is imported: it would ask the network what models cost.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"


@pytest.fixture(scope="session")
def server():
    running = RunningServer()
    yield running
    running.close()


@pytest.fixture(scope="session")
def served_demo(tmp_path_factory):
    """A process that serves the demo model as `demo`, with tools, to who has the key."""
    served = Served(
        "--served-model-name", "demo", "--max-num-seqs", "16", "--max-open-sequences", "48",
        model=demo_with_tools(tmp_path_factory.mktemp("demo")),
    )  # fmt: skip
    yield served
    served.process.send_signal(signal.SIGTERM)
    status, errors = served.end()
    assert status == 0, errors
