"""schemathesis reads /openapi.json, asks what it allows and what it forbids, and looks at answers.

Long form: `pytest -m slow tests/server/test_schema_fuzzing.py`.
"""

import subprocess
import sys

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from running_server import RunningServer, demo_engine, eventually
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

KEY = {"Authorization": "Bearer key"}
# A schema cannot say all that a request must be: much of what it allows is refused.
LEFT_OUT = ["positive_data_acceptance"]
SECONDS = 60
EXAMPLES = 15


@pytest.fixture(scope="module")
def small():
    """A server whose longest answer takes a moment."""
    running = RunningServer(
        demo_engine(max_model_len=64), api_key=["key"], max_n=3, max_prompts=4, max_logprobs=5
    )
    yield running
    running.close()


@pytest.fixture(scope="module")
def schema(small):
    return schemathesis.openapi.from_url(f"{small.url}/openapi.json", headers=KEY)


def check(operation, mode, examples):
    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        # A server that hangs does not answer in time.
        case.call_and_validate(
            headers=KEY, timeout=SECONDS, excluded_checks=CHECKS.get_by_names(LEFT_OUT)
        )

    ask()


def test_no_request_that_the_schema_can_think_of_breaks_the_server(small, schema):
    asked = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        asked.add(operation.label)
        for mode in GenerationMode:
            if mode is GenerationMode.POSITIVE or operation.body or operation.path_parameters:
                check(operation, mode, EXAMPLES)
    eventually(lambda: small.host.llm.open_requests == 0)
    eventually(lambda: small.pages_used() == 0)
    assert {"POST /v1/chat/completions", "POST /v1/completions", "GET /health"} <= asked


@pytest.mark.slow
def test_schemathesis_own_run_finds_nothing(small):
    done = subprocess.run(
        [
            sys.executable, "-m", "schemathesis.cli", "run", f"{small.url}/openapi.json",
            "--header", "Authorization: Bearer key", "--phases", "coverage,fuzzing",
            "--max-examples", "200", "--request-timeout", str(SECONDS),
            "--exclude-checks", ",".join(LEFT_OUT),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    eventually(lambda: small.host.llm.open_requests == 0)
