"""One server for all tests that only ask it something."""

import pytest
from running_server import RunningServer


@pytest.fixture(scope="session")
def server():
    running = RunningServer()
    yield running
    running.close()
