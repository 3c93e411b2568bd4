"""Architectures, one of each kind, deploy on the top rung and are exact.

Those that `end_to_end` serves, too, are measured by `pytest -m slow tests/zoo`; every architecture
that transformers has, by `autodeploy zoo` in about ten minutes.
"""

import pytest
from tiny_models import ARCHITECTURES

from autodeploy.zoo.architectures import SAMPLE
from autodeploy.zoo.run import run_zoo

SERVED_ELSEWHERE = [name for name in SAMPLE if name in (*ARCHITECTURES, "kimi_linear")]
OTHERS = [name for name in SAMPLE if name not in SERVED_ELSEWHERE]


@pytest.fixture(scope="module")
def records():
    return {record.name: record for record in run_zoo(OTHERS, jobs=2)}


def check(record):
    assert (record.outcome, record.cause) == ("rung 1", "")
    paged = any("token" in cache for cache in record.caches)
    assert (record.served["preemptions"] > 0) == paged
    assert record.served["wrong_tokens"] == 0


@pytest.mark.parametrize("name", OTHERS)
def test_it_is_packed_cached_and_exact(name, records):
    check(records[name])


@pytest.mark.slow
def test_those_served_elsewhere_are_packed_cached_and_exact():
    for record in run_zoo(SERVED_ELSEWHERE, jobs=2):
        check(record)
