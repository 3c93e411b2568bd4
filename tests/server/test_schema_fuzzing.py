"""schemathesis reads /openapi.json, asks what it allows and what it forbids, and looks at answers.

Long form: `pytest -m slow tests/server/test_schema_fuzzing.py`.
"""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from running_server import RunningServer, demo_engine, eventually
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

KEY = {"Authorization": "Bearer key"}
# A schema cannot say all that a request must be: much of what it allows is refused.
LEFT_OUT = ["positive_data_acceptance"]
SECONDS = 20


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


def check(operation, mode, examples, *, deterministic):
    @settings(
        max_examples=examples, deadline=None, derandomize=deterministic, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        # A server that hangs does not answer in time.
        case.call_and_validate(
            headers=KEY, timeout=SECONDS, excluded_checks=CHECKS.get_by_names(LEFT_OUT)
        )

    ask()


def ask_everything(small, schema, examples, *, deterministic=True):
    asked = []
    for found in schema.get_all_operations():
        operation = found.ok()
        asked.append(operation.label)
        for mode in GenerationMode:
            if mode is GenerationMode.POSITIVE or operation.body or operation.path_parameters:
                check(operation, mode, examples, deterministic=deterministic)
    eventually(lambda: small.host.llm.open_requests == 0)
    eventually(lambda: small.pages_used() == 0)
    return asked


def test_no_request_that_the_schema_can_think_of_breaks_the_server(small, schema):
    asked = ask_everything(small, schema, 15)
    assert {"POST /v1/chat/completions", "POST /v1/completions", "GET /health"} <= set(asked)


@pytest.mark.slow
def test_no_request_of_thousands_breaks_the_server(small, schema):
    ask_everything(small, schema, 1000, deterministic=False)
