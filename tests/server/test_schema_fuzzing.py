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


def small_server(**options):
    """A server whose longest answer takes a moment."""
    return RunningServer(
        demo_engine(max_model_len=64, **options), api_key=["key"], max_n=3, max_prompts=4,
        max_logprobs=5, response_store=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def small():
    running = small_server()
    yield running
    running.close()


@pytest.fixture(scope="module")
def embedder():
    running = small_server(task="embed")
    yield running
    running.close()


def operations_of(running):
    url = f"{running.url}/openapi.json"
    found = schemathesis.openapi.from_url(url, headers=KEY).get_all_operations()
    return {each.ok().label: each.ok() for each in found}


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


def is_idle(running):
    return running.host.llm.open_requests == 0 and running.pages_used() == 0


def check_in_all_modes(operation):
    for mode in GenerationMode:
        if mode is GenerationMode.POSITIVE or operation.body or operation.path_parameters:
            check(operation, mode, EXAMPLES)


def test_no_request_that_the_schema_can_think_of_breaks_the_server(small):
    operations = operations_of(small)
    for operation in operations.values():
        check_in_all_modes(operation)
    eventually(lambda: is_idle(small))
    assert operations.keys() >= {
        "POST /v1/chat/completions", "POST /v1/completions", "POST /v1/responses",
        "GET /v1/responses/{name}", "DELETE /v1/responses/{name}", "POST /v1/embeddings",
        "GET /health",
    }  # fmt: skip


def test_no_request_breaks_a_server_of_embeddings(embedder):
    operations = operations_of(embedder)
    for path in ("/v1/embeddings", "/v1/completions", "/v1/responses"):
        check_in_all_modes(operations[f"POST {path}"])
    eventually(lambda: is_idle(embedder))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["small", "embedder"])
def test_schemathesis_own_run_finds_nothing(kind, request):
    running = request.getfixturevalue(kind)
    done = subprocess.run(
        [
            sys.executable, "-m", "schemathesis.cli", "run", f"{running.url}/openapi.json",
            "--header", "Authorization: Bearer key", "--phases", "coverage,fuzzing",
            "--max-examples", "200", "--request-timeout", str(SECONDS),
            "--exclude-checks", ",".join(LEFT_OUT),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    eventually(lambda: is_idle(running))
